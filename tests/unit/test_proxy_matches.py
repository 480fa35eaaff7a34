"""What the predicates of the proxies take for a match."""

import asyncio
from unittest.mock import Mock

import pytest

from tests.support.proxies import Frame, commit, commit_after, http_request, kafka_request, produce, sql_contains
from tests.support.proxies.base import Link
from tests.support.proxies.kafka import encodings
from tests.support.proxies.postgres import Session, plain


def statements(*scripts: str) -> list[Frame]:
    """The frames of one session that executes these."""
    session = Session(Link(1, Mock(asyncio.StreamReader), Mock(asyncio.StreamWriter)))
    return [session.executed(sql.split()[0].rstrip(";").upper(), sql, b"") for sql in scripts]


@pytest.mark.parametrize(
    ("sql", "commits"),
    [
        ("COMMIT;", True),
        ("commit", True),
        ("BEGIN; insert into t values (1); COMMIT", True),
        ("ROLLBACK;", False),
        ("select committed from t", False),
        ("create table t (a int) on commit drop", False),
    ],
)
def test_a_commit_is_found_alone_and_in_a_script(sql: str, commits: bool) -> None:
    assert commit()(statements(sql)[0]) is commits


def test_a_commit_after_a_statement_is_that_of_its_own_transaction() -> None:
    frames = statements(
        "insert into outbox values (0)",
        "BEGIN;",
        "insert into inbox values (1)",
        "COMMIT;",
        "BEGIN;",
        "INSERT INTO outbox VALUES (2)",
        "ROLLBACK;",
        "BEGIN;",
        "SAVEPOINT one;",
        "insert into outbox values (3)",
        "ROLLBACK TO one;",
        "insert into inbox values (3)",
        "COMMIT;",
        "BEGIN; insert into outbox values (4); COMMIT",
    )
    assert [i for i, frame in enumerate(frames) if commit_after("insert into outbox")(frame)] == [12, 13]
    assert [i for i, frame in enumerate(frames) if commit_after("into outbox", "into inbox")(frame)] == [12]


def test_sql_is_compared_without_comments_case_and_white_space() -> None:
    sql = plain("-- name: add_record\nINSERT  INTO\n\toutbox (a) -- the row\nVALUES ($1)")
    assert sql == "INSERT INTO outbox (a) VALUES ($1)"
    assert sql_contains("insert into  outbox")(Frame(1, 1, "INSERT", sql))


@pytest.mark.parametrize("form", [0, 1])
@pytest.mark.parametrize("topic", ["deposits.credited", "p-1." + "x" * 200])
def test_a_topic_is_found_by_its_whole_name(form: int, topic: str) -> None:
    longer = Frame(1, 1, "Produce", "worker", b"..." + encodings(f"{topic}.dlq")[form] + b"...")
    exact = Frame(1, 1, "Produce", "worker", b"..." + encodings(topic)[form] + b"...")
    assert produce(topic)(exact)
    assert not produce(topic)(longer)
    assert produce()(longer)
    assert not kafka_request("Fetch", topic)(exact)


def test_an_unknown_kafka_api_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown API 'Produced'"):
        kafka_request("Produced")


def test_an_http_request_is_found_by_method_path_and_body() -> None:
    frame = Frame(1, 1, "POST", "/v1/wallets?x=1", b'POST /v1/wallets?x=1 HTTP/1.1\r\nhost: a\r\n\r\n{"refId":"u"}')
    assert http_request()(frame)
    assert http_request("POST", "/v1/wallets", body_contains='"refId":"u"')(frame)
    assert not http_request("GET")(frame)
    assert not http_request("POST", "/v2")(frame)
    assert not http_request(body_contains="host")(frame)
