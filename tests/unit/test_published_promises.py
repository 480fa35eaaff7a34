"""What was published is kept: `make docs` names each field that would be lost or narrowed, and then writes nothing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from stablerail.docs import documents, refusals
from stablerail.docs.compatibility import broken_event, broken_paths
from stablerail.docs.events import name_of, schema
from topics.catalog import Topic
from topics.envelope import read
from topics.events import Chain, Event
from topics.money import Amount

ROOT = Path(__file__).parents[2]


class Part(BaseModel):
    chain: Chain
    note: str | None = None


class Published(Event):
    """As a release had it."""

    type: ClassVar[str] = "things.happened"
    user_id: Annotated[str, Field(max_length=200, pattern="^[a-z]+$")]
    amount: Amount
    number: Annotated[int, Field(ge=0, lt=100)]
    outcome: Literal["done", "failed"]
    reason: str | int | None = None
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    by_name: dict[str, int]


def mutated(**fields: Any) -> type[Event]:
    """The event with fields as given, (type, default) or a type; None: without the field."""
    kept: dict[str, Any] = {
        name: (each.rebuild_annotation(), each.default if not each.is_required() else ...)
        for name, each in Published.model_fields.items()
        if name not in fields
    }
    given = {
        name: each if isinstance(each, tuple) else (each, ...) for name, each in fields.items() if each is not None
    }
    namespace: dict[str, Any] = {
        "__annotations__": {"type": ClassVar[str]},
        "type": Published.type,
        # it has no source to look for docstrings in: pydantic would parse this file's
        "model_config": ConfigDict(use_attribute_docstrings=False),
    }
    for name, (annotation, default) in {**kept, **given}.items():
        namespace["__annotations__"][name] = annotation
        if default is not ...:
            namespace[name] = default
    return type("Published", (Event,), {**namespace, "__module__": __name__})  # type: ignore[return-value]


def broken(model: type[Event]) -> list[str]:
    return broken_event("things.happened.v1", schema(Published), schema(model))


class Chainless(BaseModel):
    note: str | None = None


class Talkative(BaseModel):
    chain: Chain
    note: str


class OfTwo(BaseModel):
    chain: Literal["ETH", "SOL"]
    note: str | None = None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"amount": None}, "field amount is gone"),
        ({"reason": None}, "field reason is gone"),
        ({"reason": str | int | None}, "field reason is now required"),
        ({"reason": (str | None, None)}, "field reason: integer is no longer accepted"),
        ({"reason": (str | int, "none")}, "field reason: null is no longer accepted"),
        ({"number": str}, "field number: integer is no longer accepted"),
        ({"number": Annotated[int, Field(ge=1, lt=100)]}, "field number: minimum is now 1"),
        ({"number": Annotated[int, Field(ge=0, lt=99)]}, "field number: exclusiveMaximum is now 99"),
        ({"outcome": Literal["done"]}, "field outcome: 'failed' is no longer accepted"),
        ({"user_id": Annotated[str, Field(max_length=199, pattern="^[a-z]+$")]}, "field user_id: maxLength is now 199"),
        ({"user_id": Annotated[str, Field(max_length=200, pattern="^[a-y]+$")]}, "user_id: pattern is now '^[a-y]+$'"),
        ({"user_id": Literal["ada"]}, "field user_id: only 'ada' is accepted now"),
        ({"parts": Annotated[tuple[Part, ...], Field(min_length=2)]}, "field parts: minItems is now 2"),
        ({"parts": Annotated[tuple[Chainless, ...], Field(min_length=1)]}, "parts[]: field chain is gone"),
        ({"parts": Annotated[tuple[Talkative, ...], Field(min_length=1)]}, "parts[]: field note is now required"),
        ({"parts": Annotated[tuple[OfTwo, ...], Field(min_length=1)]}, "field chain: 'MATIC' is no longer accepted"),
        ({"by_name": dict[str, str]}, "field by_name{}: integer is no longer accepted"),
        ({"by_name": dict[str, Annotated[int, Field(ge=0)]]}, "field by_name{}: minimum is now 0"),
        ({"by_name": dict[str, int | float]}, "field by_name{}: may now be number"),
        ({"new": int}, "field new is now required"),
        ({"number": (Annotated[int, Field(ge=0, lt=100)], 7)}, "field number may now be missing"),
        ({"amount": Amount | None}, "field amount: may now be null"),
        ({"amount": int}, "field amount: may now be integer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_is_lost_or_narrowed_is_named(fields: dict[str, Any], said: str) -> None:
    found = broken(mutated(**fields))
    assert any(said in line for line in found), found
    assert all(line.startswith("things.happened.v1: ") for line in found)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"new": (int | None, None)},
        {"outcome": Literal["done", "failed", "held"]},
        {"number": Annotated[int, Field(ge=-1, lt=101)]},
        {"user_id": str},
        {"parts": tuple[Part, ...]},
    ],
    ids=["nothing", "optional field", "enum value", "wider limits", "no pattern", "no least number"],
)
def test_what_no_reader_misses_is_no_new_version(fields: dict[str, Any]) -> None:
    assert broken(mutated(**fields)) == []


def test_a_new_version_may_differ_in_everything_beside_the_old_one(tmp_path: Path) -> None:
    second = mutated(version=(Literal[2], 2), amount=None)
    assert (name_of(second), second.ce_type()) == ("things.happened.v2", "io.stablerail.things.happened.v2")
    (tmp_path / "events").mkdir()
    file = tmp_path / "events" / f"{name_of(Published)}.json"
    file.write_text(json.dumps(schema(Published)))
    both = {f"events/{name_of(model)}.json": json.dumps(schema(model)) for model in (Published, second)}
    assert refusals(tmp_path, both) == []
    topic = Topic("things.happened", key="user id", models=(Published, second))
    value = {"user_id": "ada", "number": 1, "outcome": "done", "parts": [{"chain": "ETH"}], "by_name": {}}
    told = [
        read(topic, json.dumps({**value, **more}).encode(), [("ce_type", ce_type), ("ce_id", b"1")]).event
        for ce_type, more in (
            (b"io.stablerail.things.happened.v1", {"amount": "1"}),
            (b"io.stablerail.things.happened.v2", {"version": 2}),
        )
    ]
    assert [(type(event), event.version) for event in told] == [(Published, 1), (second, 2)]
    assert second.known(**value).version == 2
    del both[f"events/{file.name}"]
    assert refusals(tmp_path, both) == ["things.happened.v1: no event of this type and version is declared any more"]


# -- the API --------------------------------------------------------------------------------------------------------------


class Answer(BaseModel):
    status: Literal["ok", "late"]
    amount: str
    note: str | None = None


class Order(BaseModel):
    amount: str
    note: str | None = None


def api(answer: type[BaseModel] = Answer, order: type[BaseModel] = Order, limit: Any = (int, 50)) -> dict[str, Any]:
    app = FastAPI()
    kind, default = limit

    async def read(thing: str, limit: kind = default) -> answer: ...  # type: ignore[valid-type]
    async def make(body: order) -> answer: ...  # type: ignore[valid-type]

    for function in (read, make):
        function.__annotations__ = {
            name: {"kind": kind, "answer": answer, "order": order, "str": str}[note]
            for name, note in function.__annotations__.items()
        }
    app.get("/v1/things/{thing}", response_model=answer)(read)
    app.post("/v1/things", response_model=answer, status_code=202)(make)
    return app.openapi()


class WithoutAmount(BaseModel):
    status: Literal["ok", "late"]
    note: str | None = None


class MaybeAmount(BaseModel):
    status: Literal["ok", "late"]
    amount: str | None
    note: str | None = None


class Richer(Answer):
    status: Literal["ok", "late", "lost"]  # type: ignore[assignment]
    more: int


class Demanding(Order):
    note: str  # type: ignore[assignment]


class Modest(BaseModel):
    amount: str


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": WithoutAmount}, "GET /v1/things/{thing}: answer 200: field amount is gone"),
        ({"answer": MaybeAmount}, "POST /v1/things: answer 202: field amount: may now be null"),
        ({"order": Demanding}, "POST /v1/things: body: field note is now required"),
        ({"order": Modest}, "POST /v1/things: body: field note is gone"),
        ({"limit": (int, ...)}, "GET /v1/things/{thing}: parameter limit is now required"),
        ({"limit": (Annotated[int, Field(le=10)], 5)}, "GET /v1/things/{thing}: parameter limit: maximum is now 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_or_request_that_is_narrowed_is_named(change: dict[str, Any], said: str) -> None:
    assert said in broken_paths(api(), api(**change))


def test_a_richer_answer_and_a_more_lenient_request_are_no_new_version() -> None:
    assert broken_paths(api(), api(answer=Richer, limit=(int | None, None))) == []


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (lambda now: now["paths"].pop("/v1/things"), "POST /v1/things: is gone"),
        (
            lambda now: now["paths"]["/v1/things/{thing}"]["get"]["parameters"].pop(),
            "GET /v1/things/{thing}: parameter limit is gone",
        ),
        (lambda now: now["paths"]["/v1/things"]["post"]["responses"].pop("202"), "POST /v1/things: answer 202 is gone"),
    ],
    ids=["an operation", "a parameter", "an answer"],
)
def test_what_is_removed_from_the_api_is_named(remove: Callable[[dict[str, Any]], Any], said: str) -> None:
    now = copy.deepcopy(api())
    remove(now)
    assert broken_paths(api(), now) == [said]


# -- the command ----------------------------------------------------------------------------------------------------------


async def test_the_command_writes_nothing_and_ends_with_1_where_a_promise_would_be_broken(tmp_path: Path) -> None:
    for name, text in (await documents()).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    file = tmp_path / "events" / "deposits.credited.v1.json"
    published = json.loads(file.read_text())
    published["properties"]["memo"] = {"type": "string"}  # a field that the model does not have any more
    file.write_text(json.dumps(published))
    (tmp_path / "configuration.md").write_text("old")
    command = [sys.executable, "-m", "stablerail.docs", "--directory", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 1
    assert "deposits.credited.v1: field memo is gone" in refused.stderr
    assert (tmp_path / "configuration.md").read_text() == "old"
    file.unlink()
    assert subprocess.run(command, cwd=ROOT, timeout=200).returncode == 0
    assert (tmp_path / "configuration.md").read_text() != "old"
    assert file.exists()
