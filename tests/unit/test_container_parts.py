"""STABLERAIL_TEST_PARTS=containers: which parts a run gets, and what the engine is asked for. A fake answers as Docker's API."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import MESSAGE_MAX_BYTES, Kafka
from stablerail.dev.postgres import Postgres
from tests.support import parts
from tests.support.containers import SERVICES, VARIABLE, AnvilContainer, KafkaContainer, PostgresContainer

LOGS = {
    "apache/kafka": [(1, "[KafkaRaftServer nodeId=1] Kafka Server started")],
    # Of the server that makes the databases and listens nowhere, pg_ctl writes the log to its own output.
    "postgres": [
        (1, 'listening on Unix socket "/var/run/postgresql/.s.PGSQL.5432"'),
        (1, "database system is ready to accept connections"),
        (1, "PostgreSQL init process complete; ready for start up."),
        (2, 'listening on IPv4 address "0.0.0.0", port 5432'),
        (2, "database system is ready to accept connections"),
    ],
    "ghcr.io/foundry-rs/foundry": [(1, "Listening on 0.0.0.0:8545")],
}


class Engine(ThreadingHTTPServer):
    """Docker's HTTP API as far as a container is made, started, read and removed. A log grows with each look at it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.created: list[dict[str, Any]] = []
        self.started: list[int] = []
        self.removed: list[int] = []
        self.looks: dict[int, int] = {}
        self.ends_at_once = "-"
        """The image whose container does."""

    def asked(self, image: str) -> dict[str, Any]:
        found = [each for each in self.created if each["Image"].startswith(image)]
        assert len(found) == 1, [each["Image"] for each in self.created]
        return found[0]


class _Answer(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = re.sub(r"^/v[0-9.]+", "", self.path.partition("?")[0])
        container = re.fullmatch(r"/containers/(\d+)(/\w+)?", path)
        if path == "/version":
            return self._say(200, {"ApiVersion": "1.47", "MinAPIVersion": "1.24", "Version": "27.0"})
        if path == "/containers/create":
            self.server.created.append(json.loads(body))
            return self._say(201, {"Id": str(len(self.server.created) - 1), "Warnings": []})
        if path.startswith("/images/"):
            return self._say(200, {"Id": "sha256:0", "RepoTags": [], "Config": {}})
        if container is None:
            return self._say(404, {"message": f"not faked: {self.command} {path}"})
        number, what = int(container[1]), container[2]
        if self.command == "DELETE":
            self.server.removed.append(number)
            return self._say(204)
        if what == "/start":
            self.server.started.append(number)
            return self._say(204)
        if what == "/logs":
            return self._logs(number)
        image = self.server.created[number]["Image"]
        status = "exited" if image.startswith(self.server.ends_at_once) else "running"
        state = {"Status": status, "Running": status == "running", "ExitCode": 0, "Error": ""}
        config = {"Tty": False, "Image": image, "Labels": {}}
        return self._say(
            200, {"Id": str(number), "Name": "/part", "State": state, "Config": config, "NetworkSettings": {}}
        )

    do_GET = do_POST = do_DELETE = _route  # noqa: N815 - the server's own names

    def _logs(self, number: int) -> None:
        lines = LOGS[self.server.created[number]["Image"].rpartition(":")[0]]
        looks = self.server.looks[number] = self.server.looks.get(number, 0) + 1
        stdout, stderr = ("stdout=1" in self.path, "stderr=1" in self.path)
        frames = [
            struct.pack(">BxxxL", stream, len(text) + 1) + text.encode() + b"\n"
            for stream, text in lines[: looks // 2]  # testcontainers reads both streams one after the other
            if (stream == 1 and stdout) or (stream == 2 and stderr)
        ]
        self._say(200, b"".join(frames))

    def _say(self, status: int, body: Any = b"") -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    server = Engine()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    monkeypatch.setenv(VARIABLE, "containers")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_without_the_variable_the_parts_are_processes(tmp_path: Path, tools: Tools, monkeypatch: Any) -> None:
    for value in (None, "", "embedded"):
        monkeypatch.delenv(VARIABLE, raising=False) if value is None else monkeypatch.setenv(VARIABLE, value)
        made = (parts._kafka(tmp_path, tools), parts._postgres(tmp_path, tools), parts._anvil(tmp_path, tools))
        assert [type(part) for part in made] == [Kafka, Postgres, Anvil]
    monkeypatch.setenv(VARIABLE, "docker")
    with pytest.raises(pytest.UsageError, match="embedded or containers"):
        parts._kafka(tmp_path, tools)


def test_a_run_starts_its_containers_once_and_each_of_its_processes_finds_them(engine: Engine, tools: Tools) -> None:
    with ExitStack() as run:
        directory = parts.start_shared(run)
        assert sorted(engine.started) == [0, 1]
        kafka, postgres = parts._kafka(directory, tools), parts._postgres(directory, tools)  # as another process would
        assert isinstance(kafka, KafkaContainer)
        assert isinstance(postgres, PostgresContainer)
        asked = engine.asked("apache/kafka")
        assert f"KAFKA_ADVERTISED_LISTENERS=PLAINTEXT://{kafka.bootstrap}" in asked["Env"]
        assert postgres.dsn == f"postgresql://postgres:{postgres.password}@127.0.0.1:{postgres.port}/postgres"
        assert engine.removed == []
    assert sorted(engine.removed) == [0, 1]
    assert not directory.exists()


def test_where_one_part_does_not_start_the_other_is_removed_too(engine: Engine) -> None:
    for image in ("apache/kafka", "postgres"):
        engine.ends_at_once = image
        engine.removed.clear()
        with pytest.raises(RuntimeError, match="exited"), ExitStack() as run:
            parts.start_shared(run)
        assert len(set(engine.removed)) == 2, image


def bound(asked: dict[str, Any], inside: int) -> dict[str, Any]:
    """Where a port of the container is reached, the only one there is."""
    ports = asked["HostConfig"]["PortBindings"]
    assert list(ports) == [f"{inside}/tcp"]
    return ports[f"{inside}/tcp"][0]


def test_the_broker_is_the_compose_files_on_a_port_that_means_itself_inside_and_outside(
    engine: Engine, tmp_path: Path
) -> None:
    with KafkaContainer(tmp_path) as kafka:
        asked = engine.asked("apache/kafka")
    assert asked["Image"] == SERVICES["kafka"]["image"]
    assert bound(asked, kafka.port) == {"HostIp": "127.0.0.1", "HostPort": str(kafka.port)}
    env = dict(each.split("=", 1) for each in asked["Env"])
    assert env["KAFKA_LISTENERS"] == f"PLAINTEXT://:{kafka.port},CONTROLLER://127.0.0.1:9094"
    assert env["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://127.0.0.1:{kafka.port}"
    names = {each.partition(":")[0] for each in env["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")}
    assert names == {"PLAINTEXT", "CONTROLLER"}
    assert env["KAFKA_INTER_BROKER_LISTENER_NAME"] in names
    assert env["KAFKA_MESSAGE_MAX_BYTES"] == str(MESSAGE_MAX_BYTES)
    assert env["KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR"] == "1"


def test_the_server_is_the_compose_files_with_a_password_and_the_tests_settings(engine: Engine, tmp_path: Path) -> None:
    with PostgresContainer(tmp_path, {"fsync": "off", "max_connections": 500}) as postgres:
        asked = engine.asked("postgres")
        assert engine.looks[0] >= 2 * len(LOGS["postgres"]), "ready is what it is once it listens"
    assert asked["Image"] == SERVICES["postgres"]["image"]
    assert bound(asked, 5432) == {"HostIp": "127.0.0.1", "HostPort": str(postgres.port)}
    assert asked["Env"] == [f"POSTGRES_PASSWORD={postgres.password}"]
    assert asked["Cmd"] == ["postgres", "-c", "fsync=off", "-c", "max_connections=500"]


def test_the_chain_is_the_compose_files_and_mines_a_block_for_each_transaction(engine: Engine, tmp_path: Path) -> None:
    with AnvilContainer(tmp_path) as chain:
        asked = engine.asked("ghcr.io/foundry-rs/foundry")
    assert asked["Image"] == SERVICES["anvil"]["image"]
    assert bound(asked, 8545) == {"HostIp": "127.0.0.1", "HostPort": str(chain.port)}
    assert chain.rpc_url == f"http://127.0.0.1:{chain.port}"
    assert asked["Entrypoint"] == ["anvil"]
    assert asked["Cmd"] == ["--host", "0.0.0.0", "--chain-id", str(chain.chain_id)]
    assert engine.removed == [0]
