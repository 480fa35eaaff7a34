"""docs/asyncapi.yaml: AsyncAPI 3.0. A channel for each topic; who receives and who sends, as the wiring runs them."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from types import ModuleType
from typing import Any, Final

import yaml
from aiokafka.structs import ConsumerRecord

import agents.emitter
import agents.withdrawals.requests
import connectors
import ledger.levels
import stablerail.api
from agents.crash import Stop
from agents.dead_letters import dead_letter
from agents.item import read_item
from agents.outcome import Rejected, Stage
from stablerail.config import Settings
from stablerail.config_values import EVM_CHAINS
from stablerail.docs.configuration import Defaults
from stablerail.docs.events import name_of
from stablerail.metrics import Metrics
from stablerail.movements import MOVEMENTS
from stablerail.wiring import build, services
from topics import catalog
from topics.catalog import INPUTS, TOPICS, Topic
from topics.envelope import headers_of
from topics.events import Event

_TOPICS: Final = {name: value for name, value in vars(catalog).items() if isinstance(value, Topic)}
_KAFKA: Final = "0.5.0"
_BYTES: Final = "original"
"""The message of a topic whose values are no events of ours."""
_DESCRIPTION: Final = """\
Made by `make docs` from the program. Topics carry the deployment's prefix (STABLERAIL_TOPIC_PREFIX) before their name, groups
STABLERAIL_GROUP_PREFIX. Kafka is at least once: (ce_source, ce_id) is the same whenever an event comes again. Producers outside
may send the JSON value alone; a value without ce_type is the first message of its channel. Unknown fields are ignored.
"""


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they are."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


async def document() -> str:
    settings = everything()
    stages, senders = await wired(settings)
    made = {
        "asyncapi": "3.0.0",
        "info": {"title": "Stablerail", "version": version("stablerail"), "description": _DESCRIPTION},
        "defaultContentType": "application/json",
        "channels": {topic.name: _channel(topic) for topic in TOPICS},
        "operations": dict(_operations(settings, stages, senders)),
        "components": {"schemas": {"CloudEvent": _envelope(), "DeadLetter": _dead_letter(stages[0][1])}},
    }
    return yaml.dump(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# -- what runs -----------------------------------------------------------------------------------------------------------


def everything() -> Settings:
    """The settings of a deployment with every chain and partner. Nothing is reached under them."""
    return Defaults(
        network="mainnet",
        database_url="postgresql://127.0.0.1/none",
        rpc_urls={chain: ["http://127.0.0.1:1"] for chain in EVM_CHAINS},
        circle_api_key="LIVE_API_KEY:none:none",
        circle_entity_secret="00" * 32,
        sumsub_webhook_secret="none-none",  # noqa: S106 - nobody's
    )


async def wired(settings: Settings) -> tuple[list[tuple[str, Stage[Any]]], list[ModuleType]]:
    """(movement, stage) of all stages; the modules beside them that say something: watchers, the relay, the ledger, the bridge, the API."""
    metrics = Metrics()
    shared = services(settings, metrics, Stop())
    stages: list[tuple[str, Stage[Any]]] = []
    senders = [
        agents.emitter,
        agents.withdrawals.requests,
        ledger.levels,
        *_modules(connectors),
        *_modules(stablerail.api),
    ]
    for name in MOVEMENTS:
        movement = await build(name, settings, shared, metrics)
        stages += [(name, delivery.stage) for delivery in movement.deliveries]
        senders += [module for worker in movement.workers if (module := inspect.getmodule(worker))]
        for close in movement.closing:
            await close()
    return stages, list(dict.fromkeys(senders))


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "sandbox" not in found.name:
            yield importlib.import_module(found.name)


def named_topics(module: ModuleType) -> list[Topic]:
    """The topics of the catalog that a module's code names: what is no stage names only what it sends."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return [topic for name, topic in _TOPICS.items() if name in names]


# -- channels and messages -----------------------------------------------------------------------------------------------


def _channel(topic: Topic) -> dict[str, Any]:
    config = topic.broker_config()
    return {
        "address": topic.name,
        "description": f"Key: {topic.key}.",
        "messages": {name_of(model): _message(topic, model) for model in topic.models} or {_BYTES: _original(topic)},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": {
                    "cleanup.policy": [config["cleanup.policy"]],
                    "retention.ms": int(config["retention.ms"]),
                    "max.message.bytes": int(config["max.message.bytes"]),
                },
                "bindingVersion": _KAFKA,
            }
        },
    }


def _message(topic: Topic, model: type[Event]) -> dict[str, Any]:
    ce_type = {"type": "object", "properties": {"ce_type": {"const": model.ce_type()}}}
    return {
        "name": model.ce_type(),
        "title": model.__name__,
        "summary": inspect.getdoc(model),
        "contentType": "application/json",
        "headers": {"allOf": [{"$ref": "#/components/schemas/CloudEvent"}, ce_type]},
        "payload": {"$ref": f"./events/{name_of(model)}.json"},
        "bindings": _key(topic),
    }


def _original(topic: Topic) -> dict[str, Any]:
    """Of a topic without models: dead letters, and what is not JSON."""
    message = {"name": _BYTES, "contentType": "application/octet-stream", "bindings": _key(topic)}
    if topic in [each.dlq for each in INPUTS]:
        message["summary"] = "A refused message with its own key, headers and bytes, and why it was refused."
        message["headers"] = {"$ref": "#/components/schemas/DeadLetter"}
    return message


def _key(topic: Topic) -> dict[str, Any]:
    return {"kafka": {"key": {"type": "string", "description": topic.key}, "bindingVersion": _KAFKA}}


def _envelope() -> dict[str, Any]:
    """As `headers_of` writes it."""
    sample = headers_of("type", event_id="id", source="source", time=datetime.fromtimestamp(0, UTC))
    values = {"ce_specversion": {"const": "1.0"}, "ce_time": {"type": "string", "format": "date-time"}}
    fields = {name: values.get(name, {"type": "string"}) for name, _ in sample}
    return {
        "type": "object",
        "description": "CloudEvents 1.0 in Kafka's binary mode. Every header is there where the message is ours.",
        "properties": {
            **fields,
            "traceparent": {"type": "string", "description": "W3C trace context"},
            "attempt": {"type": "string", "description": "which repeat of ours it is; absent: the first"},
        },
    }


def _dead_letter(stage: Stage[Any]) -> dict[str, Any]:
    """As `dead_letter` writes it: the headers of a message that is refused."""
    record = ConsumerRecord(stage.source.name, 0, 0, 0, 0, b"key", None, None, 0, 0, ())
    made = dead_letter(stage, read_item(stage, record), Rejected("code"), datetime.fromtimestamp(0, UTC))
    names = [name for name, _ in made.headers or ()]
    return {
        "type": "object",
        "description": "What the message came with, and:",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
    }


# -- operations ----------------------------------------------------------------------------------------------------------


def _operations(
    settings: Settings, stages: list[tuple[str, Stage[Any]]], senders: list[ModuleType]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for movement, stage in stages:
        module = inspect.getmodule(stage.decide)
        summary, _, description = (inspect.getdoc(module) or stage.name).partition("\n")
        group = {"type": "string", "const": f"{settings.group_prefix}{movement}"}
        yield (
            f"{stage.name}.receive",
            {
                **_operation("receive", stage.source, summary),
                "description": description.strip(),
                "tags": [{"name": movement}],
                "bindings": {"kafka": {"groupId": group, "bindingVersion": _KAFKA}},
            },
        )
        for topic in (*stage.emits, *(() if stage.reads else (stage.source.dlq,))):
            yield f"{stage.name}.send.{topic.name}", {**_operation("send", topic), "tags": [{"name": movement}]}
    for module in senders:
        summary = (inspect.getdoc(module) or "").partition("\n")[0]
        for topic in named_topics(module):
            yield f"{module.__name__}.send.{topic.name}", _operation("send", topic, summary)


def _operation(action: str, topic: Topic, summary: str = "") -> dict[str, Any]:
    channel = f"#/channels/{topic.name}"
    names = [name_of(model) for model in topic.models] or [_BYTES]
    return {
        "action": action,
        "channel": {"$ref": channel},
        **({"summary": summary} if summary else {}),
        "messages": [{"$ref": f"{channel}/messages/{name}"} for name in names],
    }
