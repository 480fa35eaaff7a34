"""What a reader or writer of a published schema would miss in the next one: pure, total, a line for each field.

| promise | broken when | holds for |
| --- | --- | --- |
| what was accepted is accepted | a field is gone or now required; a type, an enum value or a limit is narrower | events, parameters, request bodies |
| what was told is told | a field is gone, may be missing, may be null, or may be of another type | events, answers |

Events are written by producers and read by consumers outside, so both promises hold for them. A new enum value and a new
optional field break neither: readers ignore fields and take no value for the last one there will ever be. Where it
cannot be told whether a rule became narrower (a pattern, a format), a change is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Schema = Mapping[str, Any]

_LEAST: Final = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_MOST: Final = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_SAYS_NOTHING: Final = frozenset(
    {"$schema", "$id", "$defs", "$comment", "title", "description", "default", "example", "examples", "deprecated"}
)
_INSIDE: Final = {"items": "[]", "additionalProperties": "{}"}
_COMPARED: Final = frozenset({*_LEAST, *_MOST, *_INSIDE, "type", "const", "enum", "properties", "required"})
_TYPES: Final = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_ANYTHING: Final = "anything"


def broken_event(name: str, old: Schema, new: Schema) -> list[str]:
    """The promises that `old`, the published schema of an event, made and `new` does not keep."""
    return list(_Comparison(old, new, accepted=True, told=True).broken(old, new, name))


def broken_paths(old: Schema, new: Schema) -> list[str]:
    """The promises of a published OpenAPI document: operations, parameters, bodies, and what 2xx answers tell."""
    found: list[str] = []
    for path, operations in old["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            now = new["paths"].get(path, {}).get(method)
            found += [f"{where}: is gone"] if now is None else _broken_operation(old, new, operation, now, where)
    return found


def _broken_operation(old: Schema, new: Schema, before: Schema, now: Schema, where: str) -> Iterator[str]:
    accepting = _Comparison(old, new, accepted=True)
    parameters = {(each["in"], each["name"]): each for each in now.get("parameters", ())}
    known = {(each["in"], each["name"]): each for each in before.get("parameters", ())}
    for key, parameter in known.items():
        if key not in parameters:
            yield f"{where}: parameter {key[1]} is gone"
        else:
            yield from accepting.broken(parameter["schema"], parameters[key]["schema"], f"{where}: parameter {key[1]}")
    for key, parameter in parameters.items():
        if parameter.get("required") and not known.get(key, {}).get("required"):
            yield f"{where}: parameter {key[1]} is now required"
    body, body_now = before.get("requestBody", {}), now.get("requestBody", {})
    if body_now.get("required") and not body.get("required"):
        yield f"{where}: a body is now required"
    yield from _broken_contents(accepting, body, body_now, f"{where}: body")
    telling = _Comparison(old, new, told=True)
    for status, answer in before["responses"].items():
        if status.startswith("2"):
            if status not in now["responses"]:
                yield f"{where}: answer {status} is gone"
            else:
                yield from _broken_contents(telling, answer, now["responses"][status], f"{where}: answer {status}")


def _broken_contents(comparison: _Comparison, before: Schema, now: Schema, where: str) -> Iterator[str]:
    for media_type, content in before.get("content", {}).items():
        if media_type not in now.get("content", {}):
            yield f"{where}: {media_type} is gone"
        else:
            yield from comparison.broken(content.get("schema", {}), now["content"][media_type].get("schema", {}), where)


@dataclass
class _Comparison:
    """Of two documents, in which references are resolved."""

    old: Schema
    new: Schema
    accepted: bool = False
    told: bool = False
    _looked_at: set[tuple[str, str]] = field(default_factory=set)

    def broken(self, old: Schema, new: Schema, where: str) -> Iterator[str]:
        if "$ref" in old and "$ref" in new:
            pair = (old["$ref"], new["$ref"])
            if pair in self._looked_at:
                return  # it may hold itself
            self._looked_at.add(pair)
        before, now = _alternatives(self.old, old), _alternatives(self.new, new)
        for alternative in before:
            kind = _kind(alternative)
            matching = [each for each in now if _takes(_kind(each), kind)]
            if matching:
                yield from min((list(self._same(alternative, each, where)) for each in matching), key=len)
            elif self.accepted:
                yield f"{where}: {kind} is no longer accepted"
        if self.told:
            for kind in dict.fromkeys(map(_kind, now)):
                if not any(_takes(_kind(each), kind) for each in before):
                    yield f"{where}: may now be {kind}"

    def _same(self, old: Schema, new: Schema, where: str) -> Iterator[str]:
        """Of two schemas of one type."""
        yield from self._broken_fields(old, new, where)
        for rule, mark in _INSIDE.items():
            inside, inside_now = old.get(rule, True), new.get(rule, True)
            if isinstance(inside, Mapping) and isinstance(inside_now, Mapping):
                yield from self.broken(inside, inside_now, f"{where}{mark}")
            elif self.accepted and inside_now not in (True, inside):
                yield f"{where}: {rule} is now {inside_now!r}"
        if not self.accepted:
            return
        values, values_now = _values(old), _values(new)
        if values_now is not None:
            if values is None:
                yield f"{where}: only {', '.join(map(repr, values_now))} is accepted now"
            else:
                yield from (f"{where}: {value!r} is no longer accepted" for value in values if value not in values_now)
        for rule in _LEAST:
            if rule in new and (rule not in old or new[rule] > old[rule]):
                yield f"{where}: {rule} is now {new[rule]}"
        for rule in _MOST:
            if rule in new and (rule not in old or new[rule] < old[rule]):
                yield f"{where}: {rule} is now {new[rule]}"
        for rule in sorted(new.keys() - _COMPARED - _SAYS_NOTHING):
            if rule not in old or old[rule] != new[rule]:
                yield f"{where}: {rule} is now {new[rule]!r}"

    def _broken_fields(self, old: Schema, new: Schema, where: str) -> Iterator[str]:
        fields, fields_now = old.get("properties", {}), new.get("properties", {})
        required, required_now = old.get("required", ()), new.get("required", ())
        for name in fields:
            if name not in fields_now:
                yield f"{where}: field {name} is gone"
                continue
            yield from self.broken(fields[name], fields_now[name], f"{where}: field {name}")
            if self.told and name in required and name not in required_now:
                yield f"{where}: field {name} may now be missing"
        if self.accepted:
            for name in required_now:
                if name not in required and (name in fields or name in fields_now):
                    yield f"{where}: field {name} is now required"


def _alternatives(document: Schema, schema: Schema) -> list[Schema]:
    """The schemas of which a value meets one, references followed: each with one type at most."""
    if "$ref" in schema:
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part.replace("~1", "/").replace("~0", "~")]
        return _alternatives(document, found)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return [each for part in schema[union] for each in _alternatives(document, part)]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": type} for type in schema["type"]]
    return [schema]


def _kind(schema: Schema) -> str:
    if "type" in schema:
        return str(schema["type"])
    values = _values(schema)
    return _TYPES.get(type(values[0]), _ANYTHING) if values else _ANYTHING


def _takes(kind: str, other: str) -> bool:
    """Whether every value of the other type is of this one."""
    return kind in (_ANYTHING, other) or (kind, other) == ("number", "integer")


def _values(schema: Schema) -> list[Any] | None:
    """The only values there are, None where they are not counted out."""
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")
