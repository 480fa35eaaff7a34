"""One JSON Schema for each version of each event, as its value is on Kafka."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from topics.events import EVENTS, Event


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        """A field's title would repeat its name."""
        return False


def name_of(model: type[Event]) -> str:
    """`deposits.notified.v1`: the name of its file, its message and its schema."""
    return f"{model.type}.v{model.model_fields['version'].default}"


def schemas() -> dict[str, dict[str, Any]]:
    """By name."""
    return {name_of(model): schema(model) for model in EVENTS}


def schema(model: type[Event]) -> dict[str, Any]:
    """Of what is written: an amount is an `int` inside and a string in JSON."""
    made = model.model_json_schema(schema_generator=_Schema, mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{model.ce_type()}",
        **{name: made.pop(name) for name in ("title", "description", "type") if name in made},
        **made,
    }
