"""Apache Kafka (KRaft) from its jars: one broker, or a cluster of three whose nodes can be killed and started again."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from stablerail.dev.errors import PartFailed
from stablerail.dev.fetch import Tools
from stablerail.dev.processes import Child, free_port, port_answers, port_is_free, wait_ready

# `kafka-storage format` writes this file; it holds feature levels only, no ids and no names, so it is a constant of the
# Kafka version in kafka.lock (4.3.1). Running the tool instead costs a JVM start (0.8 s) per node.
BOOTSTRAP_CHECKPOINT = base64.b64decode(
    "AAAAAAAAAAAAAABHAAAAAALEBkAVACAAAAAAAAABofz04joAAAGh/PTiOv//////////////////AAAAASoAAAAIAAAAAxYAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AQAAAPEAAAAAAsSl0H4AAAAAAAUAAAGh/PTiRAAAAaH89OJE//////////////////8AAAAGOgAAAAEuAQwAEW1ldGFkYXRhLnZlcnNpb24AHgAAWgAAAgFO"
    "AQwAIWVsaWdpYmxlLmxlYWRlci5yZXBsaWNhcy52ZXJzaW9uAAEAADQAAAQBKAEMAA5ncm91cC52ZXJzaW9uAAEAADQAAAYBKAEMAA5zaGFyZS52ZXJzaW9u"
    "AAEAADgAAAgBLAEMABBzdHJlYW1zLnZlcnNpb24AAQAAQAAACgE0AQwAFHRyYW5zYWN0aW9uLnZlcnNpb24AAgAAAAAAAAAAAAcAAAA/AAAAAAKxVswcACAA"
    "AAAAAAABofz04kUAAAGh/PTiRf//////////////////AAAAARoAAAAIAAAABAYAAAAA"
)

# The largest record our topics take is 10 MB; the rest is the batch around it.
MESSAGE_MAX_BYTES = 12 * 1024 * 1024

PROPERTIES: Mapping[str, str | int] = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "message.max.bytes": MESSAGE_MAX_BYTES,
    "replica.fetch.max.bytes": MESSAGE_MAX_BYTES,
    "group.initial.rebalance.delay.ms": 0,
    # 6000 otherwise: a worker that asks for less stays alive and processes nothing.
    "group.min.session.timeout.ms": 1000,
    # A broker restarted after SIGKILL waits for its old session to end: 9000 otherwise.
    "broker.session.timeout.ms": 3000,
    "broker.heartbeat.interval.ms": 500,
    # A controller that lost its leader elects another within a second, not nine.
    "controller.quorum.election.timeout.ms": 300,
    "controller.quorum.fetch.timeout.ms": 1000,
    # Sizes for one machine: 50 partitions, 128 MB and 10 MB otherwise.
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.num.partitions": 1,
    "log.cleaner.dedupe.buffer.size": 4 * 1024 * 1024,
    "log.index.size.max.bytes": 1024 * 1024,
    "num.network.threads": 2,
    "num.io.threads": 2,
}

# Starts soonest. For throughput pass `jvm=()`: the second compiler is worth more than it costs after some seconds.
SHORT_LIVED = ("-XX:TieredStopAtLevel=1",)

LOGGING = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)


class Kafka:
    """`nodes` brokers, each also a controller, in `directory`; ports and data survive a restart on the same directory.

    `props` are broker properties put over PROPERTIES. Three nodes replicate three times with two in sync.
    """

    def __init__(
        self,
        directory: Path,
        tools: Tools,
        *,
        nodes: int = 1,
        heap: str = "256m",
        props: Mapping[str, str | int] | None = None,
        jvm: Sequence[str] = SHORT_LIVED,
    ) -> None:
        self.directory = directory.absolute()
        self.node_ids = range(1, nodes + 1)
        self._tools = tools
        self._jvm = [f"-Xmx{heap}", "-XX:+UseSerialGC", *jvm]
        self._children: dict[int, Child] = {}
        self._cluster_id, self._ports, self._controller_ports = self._identity()
        replicas, in_sync = min(3, nodes), max(1, min(3, nodes) - 1)
        voters = ",".join(f"{node}@127.0.0.1:{self._controller_ports[node]}" for node in self.node_ids)
        self._props: dict[str, str | int] = {
            **PROPERTIES,
            "controller.quorum.voters": voters,
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": in_sync,
            **(props or {}),
        }

    @property
    def bootstrap(self) -> str:
        """`127.0.0.1:PORT`, joined by commas for several nodes."""
        return ",".join(f"127.0.0.1:{self._ports[node]}" for node in self.node_ids)

    def pid(self, node: int = 1) -> int:
        return self._children[node].pid

    def log(self, node: int = 1) -> Path:
        return self.directory / f"node{node}.log"

    def is_running(self, node: int = 1) -> bool:
        return node in self._children and self._children[node].returncode is None

    def start(self, *nodes: int, timeout_s: float = 120) -> Self:
        """The nodes named, else all; returns when each answers. Raises PartFailed and leaves none of them running."""
        todo = [node for node in nodes or self.node_ids if not self.is_running(node)]
        for node in todo:
            for port in (self._ports[node], self._controller_ports[node]):
                if not port_is_free(port):
                    raise PartFailed(f"port {port} of Kafka node {node} is in use", "stop what listens there")
        deadline = time.monotonic() + timeout_s
        try:
            for node in todo:
                self._children[node] = self._spawn(node)
            for node in todo:
                # The broker opens its port last, once it is registered and unfenced.
                answers = partial(port_answers, self._ports[node])
                wait_ready(self._children[node], f"Kafka node {node}", answers, deadline - time.monotonic())
        except BaseException:
            self.kill(*todo)
            raise
        return self

    def stop(self, *nodes: int) -> None:
        """SIGTERM, then SIGKILL: after 2 s for a whole cluster, whose last nodes wait in vain for a quorum."""
        self._end(nodes, signal.SIGTERM, timeout_s=2 if not nodes and len(self.node_ids) > 1 else 15)

    def kill(self, *nodes: int) -> None:
        self._end(nodes, signal.SIGKILL, timeout_s=10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end(self, nodes: Sequence[int], number: int, timeout_s: float) -> None:
        ending = [child for node in nodes or self.node_ids if (child := self._children.pop(node, None))]
        for child in ending:
            child.send_signal(number)
        deadline = time.monotonic() + timeout_s
        for child in ending:
            child.stop(number, max(0.0, deadline - time.monotonic()))

    def _identity(self) -> tuple[str, dict[int, int], dict[int, int]]:
        """Cluster id and ports, drawn once per directory."""
        state = self.directory / "cluster.json"
        if not state.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            ports: set[int] = set()
            while len(ports) < 2 * len(self.node_ids):
                ports.add(free_port())
            state.write_text(json.dumps({"cluster_id": _kafka_uuid(), "ports": list(ports)}))
        known = json.loads(state.read_text())
        nodes = len(known["ports"]) // 2
        if nodes != len(self.node_ids):
            raise PartFailed(f"{self.directory} holds a cluster of {nodes} nodes", "use another directory")
        listeners, controllers = known["ports"][:nodes], known["ports"][nodes:]
        return (
            known["cluster_id"],
            dict(zip(self.node_ids, listeners, strict=True)),
            dict(zip(self.node_ids, controllers, strict=True)),
        )

    def _spawn(self, node: int) -> Child:
        data = self.directory / f"node{node}"
        if not (data / "meta.properties").exists():
            data.mkdir(parents=True, exist_ok=True)
            (data / "bootstrap.checkpoint").write_bytes(BOOTSTRAP_CHECKPOINT)
            meta = f"version=1\nnode.id={node}\ncluster.id={self._cluster_id}\ndirectory.id={_kafka_uuid()}\n"
            (data / "meta.properties").write_text(meta)
        listeners = f"PLAINTEXT://127.0.0.1:{self._ports[node]},CONTROLLER://127.0.0.1:{self._controller_ports[node]}"
        # Names relative to the working directory: whatever stands above it, properties are Latin-1 and `log.dirs` splits at commas.
        settings = {**self._props, "node.id": node, "log.dirs": data.name, "listeners": listeners}
        file = self.directory / f"node{node}.properties"
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        class_path = os.pathsep.join(map(str, self._tools.jars))
        command: list[str | Path] = [
            self._tools.java,
            *self._jvm,
            *LOGGING,
            "-cp",
            class_path,
            "kafka.Kafka",
            file.name,
        ]
        env = {**os.environ, "LC_ALL": "C.UTF-8"}  # how Java reads the class path
        # Nothing is lost by SIGKILL that fsync-less acknowledgement had not risked already; an orphan is to go at once.
        return Child(command, log=self.log(node), env=env, cwd=self.directory, orphan_signal=signal.SIGKILL)


def _kafka_uuid() -> str:
    """As Kafka writes ids: base64url of 16 bytes, not beginning with a dash."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A", 1)
