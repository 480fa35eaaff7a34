"""A Kafka proxy: requests by API, replies by correlation id.

Brokers tell their address in Metadata, FindCoordinator and DescribeCluster replies; there the upstream's port is
replaced by the proxy's, so that clients keep coming through it. In every version of these the port follows the host's
bytes, so nothing has to be decoded and no length changes. The brokers' advertised host is the one given here.

A client's own retry is one more request: on a topic that has just been made, a Produce may be answered NotLeader and sent
again. Wait for the topic's leader before you count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.support.proxies.base import Link, Proxy, until_either_ends
from tests.support.proxies.hold import Frame, Hold, Match

PRODUCE, METADATA, OFFSET_COMMIT, FIND_COORDINATOR, DESCRIBE_CLUSTER = 0, 3, 8, 10, 60
TELLS_ADDRESS = (METADATA, FIND_COORDINATOR, DESCRIBE_CLUSTER)
API_NAMES = {
    PRODUCE: "Produce",
    1: "Fetch",
    2: "ListOffsets",
    METADATA: "Metadata",
    OFFSET_COMMIT: "OffsetCommit",
    9: "OffsetFetch",
    FIND_COORDINATOR: "FindCoordinator",
    11: "JoinGroup",
    12: "Heartbeat",
    13: "LeaveGroup",
    14: "SyncGroup",
    18: "ApiVersions",
    19: "CreateTopics",
    20: "DeleteTopics",
    22: "InitProducerId",
    DESCRIBE_CLUSTER: "DescribeCluster",
}
HEADER_BYTES = 10  # API key, its version, correlation id, length of the client id


def kafka_request(api: str, name: str | None = None) -> Match:
    """Requests of an API; with a name, those that carry it as a whole string (a topic, a group).

    Topics are found by name, which Produce and Fetch carry up to the versions that aiokafka speaks.
    """
    if api not in API_NAMES.values():
        raise ValueError(f"unknown API {api!r}: want one of {', '.join(API_NAMES.values())}")
    return lambda frame: frame.kind == api and (name is None or any(form in frame.raw for form in encodings(name)))


def produce(topic: str | None = None) -> Match:
    return kafka_request("Produce", topic)


def offset_commit(group: str | None = None) -> Match:
    return kafka_request("OffsetCommit", group)


def encodings(name: str) -> tuple[bytes, bytes]:
    """A string as the older and as the flexible versions of an API write it: the length before keeps names apart."""
    data = name.encode()
    rest, varint = len(data) + 1, b""
    while rest > 127:
        varint += bytes([rest & 127 | 128])
        rest >>= 7
    return len(data).to_bytes(2) + data, varint + bytes([rest]) + data


class KafkaProxy(Proxy):
    """`peers`: the proxies of the whole cluster, this one too, where there are several brokers."""

    peers: Sequence[KafkaProxy] = ()

    def readdressed(self, raw: bytes) -> bytes:
        """A reply that tells addresses, with the proxies' in the brokers' place."""
        for one in self.peers or (self,):
            host = one.upstream[0].encode()
            raw = raw.replace(host + one.upstream[1].to_bytes(4), host + one.port.to_bytes(4))
        return raw

    async def forward(self, raw: bytes, writer: asyncio.StreamWriter) -> None:
        """A whole message, either way."""
        writer.write(raw)
        await writer.drain()

    async def serve(self, link: Link) -> None:
        reader, writer = await link.dial(self.upstream)
        waiting: dict[int, tuple[int, Frame, list[Hold]]] = {}  # by correlation id
        await until_either_ends(self._up(link, writer, waiting), self._down(link, reader, waiting))

    async def _up(
        self, link: Link, broker: asyncio.StreamWriter, waiting: dict[int, tuple[int, Frame, list[Hold]]]
    ) -> None:
        while True:
            raw = await read_message(link.reader)
            api, correlation = int.from_bytes(raw[4:6]), int.from_bytes(raw[8:12])
            client_bytes = max(0, int.from_bytes(raw[12:14], signed=True))
            link.sequence += 1
            client = raw[4 + HEADER_BYTES :][:client_bytes].decode()
            frame = Frame(link.number, link.sequence, API_NAMES.get(api, f"API {api}"), client, raw)
            requests, replies = self.note(frame)
            async with Hold.passing(requests, frame, link.writer):
                waiting[correlation] = api, frame, replies
                await self.forward(raw, broker)

    async def _down(
        self, link: Link, broker: asyncio.StreamReader, waiting: dict[int, tuple[int, Frame, list[Hold]]]
    ) -> None:
        while True:
            raw = await read_message(broker)
            api, frame, holds = waiting.pop(int.from_bytes(raw[4:8]))
            if api in TELLS_ADDRESS:
                raw = self.readdressed(raw)
            async with Hold.passing(holds, frame, link.writer):
                await self.forward(raw, link.writer)


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """A whole message with its length before it."""
    head = await reader.readexactly(4)
    return head + await reader.readexactly(int.from_bytes(head))
