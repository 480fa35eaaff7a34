"""Kafka, PostgreSQL and anvil in containers (Testcontainers) in place of processes: STABLERAIL_TEST_PARTS=containers.

The images are those of docker-compose.kafka.yml. Ports and the password are drawn before anything starts and kept in the
directory, as those of the embedded parts are: so every process of a run finds the parts that one of them started. What a
test starts for itself, to stop or to kill it, is embedded in any case.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest
import yaml

from stablerail.dev.anvil import POLYGON_AMOY, Node
from stablerail.dev.kafka import PROPERTIES
from stablerail.dev.postgres import Server
from stablerail.dev.processes import free_port

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

VARIABLE = "STABLERAIL_TEST_PARTS"
SERVICES = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.kafka.yml").read_text())["services"]


def wanted() -> bool:
    """Whether this run's parts are containers."""
    chosen = os.environ.get(VARIABLE) or "embedded"
    if chosen not in ("embedded", "containers"):
        raise pytest.UsageError(f"{VARIABLE} is embedded or containers")
    return chosen == "containers"


class InContainer:
    """One part: `service` of the compose file, on a port of loopback."""

    service: ClassVar[str]
    says: ClassVar[str]
    """What its log says once it serves."""

    def __init__(self, directory: Path) -> None:
        state = directory / f"{self.service}.json"
        if not state.exists():
            directory.mkdir(parents=True, exist_ok=True)
            state.touch(mode=0o600)
            state.write_text(json.dumps({"port": free_port(), "password": secrets.token_urlsafe(24)}))
        known = json.loads(state.read_text())
        self.port: int = known["port"]
        self.password: str = known["password"]
        self._container: DockerContainer | None = None

    def container(self) -> DockerContainer:
        from testcontainers.core.container import DockerContainer  # a run without containers need not wait for it
        from testcontainers.core.wait_strategies import LogMessageWaitStrategy

        made = DockerContainer(SERVICES[self.service]["image"], env=self.environment())
        made.ports[f"{self.port_inside()}/tcp"] = ("127.0.0.1", self.port)  # with_bind_ports binds every address
        started = LogMessageWaitStrategy(self.says).with_startup_timeout(60).with_poll_interval(0.1)
        return made.waiting_for(started)

    def environment(self) -> dict[str, str]:
        return {}

    def port_inside(self) -> int:
        raise NotImplementedError

    def start(self) -> Self:
        self._container = self.container()
        try:
            self._container.start()
        except BaseException:
            self.stop()  # it may run, and nobody else knows of it
            raise
        return self

    def stop(self) -> None:
        if self._container is not None:
            self._container.stop()
            self._container = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class KafkaContainer(InContainer):
    service = "kafka"
    says = "Kafka Server started"

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def port_inside(self) -> int:
        """The same: the broker's own address must mean the broker inside too."""
        return self.port

    def environment(self) -> dict[str, str]:
        properties = {f"KAFKA_{name.upper().replace('.', '_')}": str(value) for name, value in PROPERTIES.items()}
        listeners = {
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@127.0.0.1:9094",
            "KAFKA_LISTENERS": f"PLAINTEXT://:{self.port},CONTROLLER://127.0.0.1:9094",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{self.bootstrap}",
            "KAFKA_INTER_BROKER_LISTENER_NAME": "PLAINTEXT",
        }
        compose = {name: str(value) for name, value in SERVICES[self.service]["environment"].items()}
        return {**compose, **properties, **listeners}


class PostgresContainer(InContainer, Server):
    service = "postgres"
    says = r"(?s)listening on IPv[46] address.*ready to accept connections"
    """It is ready once before, to make its databases, and listens on no address then."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(directory)
        self._settings = settings

    def port_inside(self) -> int:
        return 5432

    def environment(self) -> dict[str, str]:
        return {"POSTGRES_PASSWORD": self.password}

    def container(self) -> DockerContainer:
        options = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        return super().container().with_command(["postgres", *options])


class AnvilContainer(InContainer, Node):
    service = "anvil"
    says = "Listening on"

    def __init__(self, directory: Path) -> None:
        InContainer.__init__(self, directory)
        Node.__init__(self, f"http://127.0.0.1:{self.port}", POLYGON_AMOY)

    def port_inside(self) -> int:
        return 8545

    def container(self) -> DockerContainer:
        command = ["--host", "0.0.0.0", "--chain-id", str(self.chain_id)]
        return super().container().with_kwargs(entrypoint=["anvil"]).with_command(command)
