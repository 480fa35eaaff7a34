"""The reference under docs/ is what the program is, and is valid: OpenAPI 3.1, AsyncAPI 3.0, JSON Schema 2020-12."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from pydantic import PlainSerializer

from stablerail.config import PREFIX, Settings
from stablerail.docs import EVENTS, asyncapi, documents, events, refusals
from stablerail.docs.configuration import is_secret
from stablerail.movements import MOVEMENTS
from tests.unit.test_topics_events import EXAMPLES
from topics.catalog import INPUTS, TOPICS
from topics.envelope import value_of
from topics.events import Event

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return {
        "asyncapi": yaml.safe_load((DOCS / "asyncapi.yaml").read_text()),
        "openapi": json.loads((DOCS / "openapi.json").read_text()),
    }


def valid(document: Any, schema: dict[str, Any]) -> None:
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    error = jsonschema.exceptions.best_match(kind(schema).iter_errors(document))
    assert error is None, f"{error.json_path}: {error.message[:500]}"


async def test_every_document_is_what_the_program_makes_now() -> None:
    made = await documents()
    stale = [name for name, text in made.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    foreign = {f"{EVENTS}/{file.name}" for file in (DOCS / EVENTS).iterdir()} - made.keys()
    assert not stale, f"docs/ is not what the program says ({', '.join(stale)}): run make docs"
    assert not foreign, f"nothing makes {', '.join(sorted(foreign))}"
    assert refusals(DOCS, made) == []


async def test_the_machine_and_its_settings_change_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    before = await documents()
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STABLERAIL_NETWORK", "mainnet")
    monkeypatch.setenv("STABLERAIL_TOPIC_PREFIX", "elsewhere.")
    monkeypatch.setenv("DATABASE_URL", "postgresql://s3cr3t:s3cr3t@host/db")
    assert await documents() == before


@pytest.mark.parametrize("name", ["asyncapi", "openapi"])
def test_the_document_is_valid_by_its_standards_own_schema(name: str, committed: dict[str, Any]) -> None:
    file = {"asyncapi": "asyncapi-3.0.0.json", "openapi": "openapi-3.1.json"}[name]
    valid(committed[name], json.loads((ROOT / "tests" / "schemas" / file).read_text()))


@pytest.mark.parametrize("model", EXAMPLES, ids=lambda model: model.type)
def test_what_is_on_kafka_is_valid_by_the_published_schema(model: type[Event]) -> None:
    schema = json.loads((DOCS / EVENTS / f"{events.name_of(model)}.json").read_text())
    valid(EXAMPLES[model], schema)
    valid(json.loads(value_of(model.model_validate_json(json.dumps(EXAMPLES[model])))), schema)


@pytest.mark.parametrize("amount", [25, 25.0, "-1", "1e3", "0.0000001", "", "01"])
def test_an_amount_that_is_refused_is_invalid_by_the_published_schema_too(amount: Any) -> None:
    schema = json.loads((DOCS / EVENTS / "deposits.notified.v1.json").read_text())
    example = next(fields for model, fields in EXAMPLES.items() if model.type == "deposits.notified")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**example, "amount": amount}, schema)


def test_every_topic_is_a_channel_and_every_reference_leads_somewhere(committed: dict[str, Any]) -> None:
    document = committed["asyncapi"]
    assert list(document["channels"]) == [topic.name for topic in TOPICS]

    def resolve(reference: str) -> Any:
        file, _, pointer = reference.partition("#")
        found = json.loads((DOCS / file).read_text()) if file else document
        for part in pointer.split("/")[1:]:
            found = found[part]
        return found

    def references(node: Any) -> list[str]:
        own = [node["$ref"]] if isinstance(node, dict) and "$ref" in node else []
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return own + [found for value in inner for found in references(value)]

    assert len(references(document)) > 2 * len(INPUTS)
    for reference in references(document):
        assert resolve(reference), reference


async def test_every_stage_that_runs_is_in_the_document_with_what_it_reads_and_tells(committed: dict[str, Any]) -> None:
    operations = committed["asyncapi"]["operations"]
    stages, senders = await asyncapi.wired(asyncapi.everything())
    assert {movement for movement, _ in stages} <= set(MOVEMENTS)
    for _, stage in stages:
        receives = operations[f"{stage.name}.receive"]
        assert receives["channel"]["$ref"] == f"#/channels/{stage.source.name}"
        read = receives["summary"].partition(" -> ")[0].split(", ")
        name = stage.source.name if stage.reads is None or stage.source.name in read else "<topic>.dlq"
        assert name in read, "the first line of the stage's module"
        for topic in (*stage.emits, *(() if stage.reads else (stage.source.dlq,))):
            assert operations[f"{stage.name}.send.{topic.name}"]["action"] == "send"
    assert {module.__name__ for module in senders} >= {"agents.chains.watch_chain", "connectors.webhooks.bridge"}


def test_producers_that_are_no_stage_are_in_the_document(committed: dict[str, Any]) -> None:
    operations = committed["asyncapi"]["operations"]
    for name in (
        "agents.emitter.send.journal",
        "ledger.levels.send.buffers.levels",
        "agents.chains.watch_chain.send.chain.heads",
        "agents.chains.watch_chain.send.deposits.notified",
        "connectors.circle.webhooks.send.deposits.notified",
        "connectors.kyc.sumsub.send.kyc.approved",
        "connectors.webhooks.bridge.send.webhooks.dlq",
    ):
        assert operations[name]["action"] == "send"


def test_the_schema_tells_what_is_in_the_message_not_what_the_program_holds() -> None:
    class Weighed(Event):
        type = "things.weighed"
        weight: Annotated[int, PlainSerializer(str, return_type=str, when_used="json")]

    assert events.schema(Weighed)["properties"]["weight"] == {"type": "string"}


def test_every_setting_is_in_the_reference_and_those_that_hide_something_are_called_secret() -> None:
    lines = (DOCS / "configuration.md").read_text().splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith(f"| `{PREFIX}")}
    assert list(rows) == [PREFIX + field.upper() for field in Settings.model_fields]
    secret = {field for field in Settings.model_fields if rows[PREFIX + field.upper()].endswith("| secret |")}
    assert secret == {field for field in Settings.model_fields if is_secret(field)}
    assert {"database_url", "rpc_urls", "circle_api_key", "circle_entity_secret"} <= secret
    assert not {field for field in Settings.model_fields if field.endswith(("secret", "api_key"))} - secret
