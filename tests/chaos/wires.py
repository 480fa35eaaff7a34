"""The wires between the product and its parts, which can be cut, slowed, or made to deliver half of what they carry."""

from __future__ import annotations

import asyncio

from tests.support.proxies import KafkaProxy, Proxy
from tests.support.proxies.base import READ_BYTES_MAX, Link, until_either_ends
from tests.support.proxies.hold import Dropped


class Troubled(Proxy):
    """`delay_s` before each piece; the next `halves` pieces arrive by half, and their connection ends."""

    delay_s = 0.0
    halves = 0

    async def carry(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.halves > 0:
            self.halves -= 1
            writer.write(data[: len(data) // 2])
            await writer.drain()
            raise Dropped
        writer.write(data)
        await writer.drain()

    def heal(self) -> None:
        self.delay_s, self.halves = 0.0, 0


class Wire(Troubled):
    """Carries bytes, whatever they mean."""

    async def serve(self, link: Link) -> None:
        reader, writer = await link.dial(self.upstream)
        await until_either_ends(self._pump(link.reader, writer), self._pump(reader, link.writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_BYTES_MAX):
            await self.carry(data, writer)


class KafkaWire(Troubled, KafkaProxy):
    """Before one broker of several; `peers` are the wires before all of them."""

    async def forward(self, raw: bytes, writer: asyncio.StreamWriter) -> None:
        await self.carry(raw, writer)
