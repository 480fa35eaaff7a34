"""What reaches the log: one JSON object per line, masked, with its trace; and W3C trace contexts."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from stablerail import telemetry
from stablerail.telemetry import child_traceparent, configure_logging, new_traceparent
from topics.envelope import trace_id
from topics.trace import read_traceparent

TOKEN = "sr_0123456789abcdef_" + "a7" * 32


@pytest.fixture
def stream() -> io.StringIO:
    output = io.StringIO()
    configure_logging("json", "info", output)
    return output


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_its_trace(stream: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(trace_id="0af7651916cd43dd8448eb211c80319c"):
        structlog.get_logger("agents.stage").info("credited", amount=25_000_000)
    structlog.get_logger("agents.stage").info("after")
    first, second = lines(stream)
    assert first["message"] == "credited"
    assert (first["trace_id"], first["amount"]) == ("0af7651916cd43dd8448eb211c80319c", 25_000_000)
    assert first["level"] == "info"
    assert first["timestamp"].endswith("Z")
    assert "trace_id" not in second


def test_the_standard_librarys_loggers_come_out_the_same_way(stream: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(trace_id="0af7"):
        logging.getLogger("some.library").warning("slow by %d ms", 12, extra={"api_key": "s3cr3t", "chain": "MATIC"})
    (line,) = lines(stream)
    assert (line["message"], line["logger"], line["trace_id"]) == ("slow by 12 ms", "some.library", "0af7")
    assert (line["api_key"], line["chain"]) == (telemetry.MASK, "MATIC")


def test_chatty_libraries_are_heard_from_warning_on(stream: io.StringIO) -> None:
    for name in ("aiokafka.consumer.fetcher", "faust.app", "mode.supervisors"):
        logging.getLogger(name).info("hello")
        logging.getLogger(name).warning("trouble")
    assert [line["message"] for line in lines(stream)] == ["trouble"] * 3


def test_lines_below_the_level_are_dropped(stream: io.StringIO) -> None:
    structlog.get_logger("x").debug("details")
    assert lines(stream) == []


def test_no_secret_reaches_the_log(stream: io.StringIO) -> None:
    log = structlog.get_logger("x")
    log.info(
        f"calling with {TOKEN}",
        value=SecretStr("s3cr3t"),
        circle_api_key="s3cr3t",
        headers={"Authorization": "Bearer s3cr3t", "X-App-Access-Token": "s3cr3t", "Accept": "json"},
        entitySecretCiphertext="s3cr3t",
        nested=[{"deep": {"password": "s3cr3t"}}, SecretStr("s3cr3t")],
        dsn_of_db="s3cr3t",
        url="postgresql://rail:s3cr3t@db/rail",
        plain="TEST_API_KEY:0a1b:s3cr3t",
    )
    logging.getLogger("driver").error("cannot connect to %s", "postgresql://rail:s3cr3t@db/rail")
    text = stream.getvalue()
    assert "s3cr3t" not in text
    assert "a7a7" not in text
    assert "sr_0123456789abcdef_" in text
    assert "postgresql://rail:********@db/rail" in text
    assert lines(stream)[0]["headers"]["Accept"] == "json"


def test_an_exceptions_text_is_masked_too(stream: io.StringIO) -> None:
    try:
        raise OSError("no route to amqp://u:s3cr3t@host")
    except OSError:
        structlog.get_logger("x").exception("failed", cause=ValueError("at postgresql://u:s3cr3t@host"))
    (line,) = lines(stream)
    assert "s3cr3t" not in json.dumps(line)
    assert "no route to amqp://u:********@host" in line["exception"]


def test_ids_of_keys_and_tokens_stay_readable(stream: io.StringIO) -> None:
    structlog.get_logger("x").info("refused", key_id="k-1", token_id="t-1", idempotency_key="i-1", webhook_key="w")
    (line,) = lines(stream)
    assert (line["key_id"], line["token_id"], line["idempotency_key"]) == ("k-1", "t-1", "i-1")
    assert line["webhook_key"] == telemetry.MASK


def test_the_console_form_is_masked_too(stream: io.StringIO) -> None:
    console = io.StringIO()
    configure_logging("console", "info", console)
    try:
        raise OSError("postgresql://u:s3cr3t@host")
    except OSError:
        structlog.get_logger("x").exception("failed", api_key="s3cr3t", password=SecretStr("s3cr3t"))
    assert "failed" in console.getvalue()
    assert "s3cr3t" not in console.getvalue()


def test_auto_is_json_where_nobody_looks_at_a_terminal(stream: io.StringIO) -> None:
    output = io.StringIO()
    configure_logging("auto", "info", output)
    structlog.get_logger("x").info("hello")
    assert lines(output)[0]["message"] == "hello"


def test_a_trace_goes_on_with_a_new_span() -> None:
    parent = new_traceparent()
    child = child_traceparent(parent)
    assert trace_id(child) == trace_id(parent)
    assert child != parent
    assert child_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00").endswith("-00")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-extra",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
    ],
)
def test_what_is_no_trace_context_starts_a_new_trace(header: str | None) -> None:
    assert read_traceparent(header) is None
    made = child_traceparent(header)
    assert read_traceparent(made) == made


def test_a_later_version_of_the_header_is_read_as_far_as_we_know_it() -> None:
    known = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert read_traceparent(f"01-{known}-more") == f"00-{known}"
    assert read_traceparent(f"01-{known}more") is None
