"""A thousand withdrawals in flight on four lanes, while endpoints lose requests and replies, refuse, lag and hide what is mined, and
workers die: each is paid once, by nonces without a gap."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections import Counter
from datetime import timedelta

from aiohttp import web

from agents.withdrawals.raising import RaisePolicy
from chain.errors import ChainError
from chain.signer import KeySigner
from ledger.record import Message
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import USDC, Process, Sending, messages, sending
from topics.catalog import TRANSACTIONS_CONFIRMED, TRANSACTIONS_SIGNED

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

LANES = 4
IN_FLIGHT = 250
"""Of a lane: a thousand together."""
ROUNDS_MAX = 300
LIFE = 6
"""Rounds after which a worker dies and another takes over."""


class Faulty(LyingEndpoint):
    """Each request meets what is drawn. `hides`: now and then it also lags, and does not know what is mined."""

    def __init__(self, upstream: str, drawn: random.Random, hides: bool) -> None:
        super().__init__(upstream)
        self._drawn = drawn
        self.met = Counter[str]()
        if hides:
            self.lies = {
                "eth_getTransactionReceipt": lambda _params, honest: None if self._lags() else honest,
                "eth_getTransactionByHash": lambda _params, honest: None if self._lags() else honest,
                "eth_getTransactionCount": lambda _params, honest: (
                    hex(max(int(honest, 16) - 3, 0)) if self._lags() else honest
                ),
            }

    def _lags(self) -> bool:
        lags = self._drawn.random() < 0.1
        self.met["lags"] += lags
        return lags

    async def _answer(self, request: web.Request) -> web.Response:
        (fault,) = self._drawn.choices(("none", "lost", "reply lost", "limited", "garbage"), (80, 5, 8, 4, 3))
        self.met[fault] += 1
        if fault == "lost":
            return web.Response(status=503)
        if fault == "limited":
            return web.Response(status=429)
        if fault == "garbage":
            return web.Response(body=b"<html>", content_type="application/json")
        answer = await super()._answer(request)
        return web.Response(status=502) if fault == "reply lost" else answer


async def send(desk: Sending, process: Process, told: list[Message], attempt: int) -> None:
    """As the schedule would: what no node is known to have is sent again."""
    rows = await desk.connection.fetch("SELECT tx_hash FROM attempts WHERE status = 'signed'")
    unsent = {row[0] for row in rows}
    await desk.sent(process, [one for one in told if one.id.partition(":")[0] in unsent], attempt=attempt)


async def answering(desk: Sending) -> None:
    """Until one endpoint does: rounds while both have asked us to wait would prove nothing."""
    while True:
        for rpc in desk.rpcs:
            with contextlib.suppress(ChainError):
                await rpc.head()
                return
        await asyncio.sleep(0.05)


async def one_round(desk: Sending, process: Process, told: list[Message], attempt: int) -> None:
    """A block, every stage that it wakes, and what follows."""
    await answering(desk)
    await desk.anvil.mine()
    head = await desk.newest()
    said: list[Message] = []
    for stage in (process.track, process.wait, process.raising):
        said += messages(await desk.run(process, stage, head))
    told += [one for one in said if one.topic == TRANSACTIONS_SIGNED.name]
    await desk.run(process, process.settling, *(one for one in said if one.topic == TRANSACTIONS_CONFIRMED.name))
    await send(desk, process, told, attempt)


async def test_a_thousand_in_flight_on_four_lanes_are_each_paid_once_under_faults_of_their_endpoints(
    connection: Connection, dsn: str, chain: Anvil, token: Usdc
) -> None:
    drawn = random.Random(9)
    others = [KeySigner(secrets.token_bytes(32)) for _ in range(LANES - 1)]
    async with (
        sending(connection, connect_to(dsn), chain, token, others=others) as desk,
        Faulty(chain.rpc_url, drawn, hides=False) as one,
        Faulty(chain.rpc_url, drawn, hides=True) as other,
    ):
        desk.in_flight_max, desk.rule = IN_FLIGHT, RaisePolicy(blocks=5)
        await desk.head(desk.process())  # its lanes are begun: while an endpoint is away none is
        desk.rpcs = [desk.rpc(one.url), desk.rpc(other.url)]
        asked = await desk.ask(LANES * IN_FLIGHT)
        told: list[Message] = []
        process = desk.process()
        for _ in range(ROUNDS_MAX):  # before the first block
            await answering(desk)
            told += messages(await desk.run(process, process.wait, await desk.newest()))
            if len(told) == len(asked):
                break
        assert await desk.statuses() == {("broadcasting", "signed"): len(asked)}
        for number in range(1, ROUNDS_MAX):
            if number % LIFE == 0:
                process = desk.process()
            await one_round(desk, process, told, number)
            ended = await connection.fetchval("SELECT count(*) FROM withdrawals WHERE status = 'completed'")
            if ended == len(asked):
                break
            desk.now += timedelta(seconds=20)
        assert ended == len(asked), await desk.statuses()
        assert Counter(await desk.paid()) == Counter((one.recipient, USDC) for one in asked)
        for signer in (desk.signer, *desk.others):
            used = sorted(set(await desk.nonces_of(signer)))
            assert used == list(range(len(used)))
            assert len(used) >= IN_FLIGHT // 2
        assert min((one.met + other.met)[fault] for fault in ("lost", "reply lost", "limited", "garbage", "lags")) > 0
        await assert_holds(connection)
