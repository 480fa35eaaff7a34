"""What breaks, drawn from a seed: each fault hits, lasts a while, and is healed again before it is forgotten."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, Final

import aiohttp

from stablerail.dev.anvil import RpcRefused
from stablerail.dev.errors import DevError
from tests.chaos.chain_faults import ChainFaults, honest
from tests.chaos.inputs import Fault, History
from tests.chaos.load import Load
from tests.chaos.rig import FUSE_RUN, MOVEMENTS, SESSION_S, Rig

FUSED: Final = {"orders.filled": "investing", "deposits.notified": "deposits", "withdrawals.requested": "withdrawals"}
HARD: Final = ("broker", "postgres", "fuse", "rolling")
"""Each needs the rest of the world: never two of them at once."""


class Faults(ChainFaults):
    """`work` breaks something every now and then until it is cancelled; `heal` mends whatever is still broken."""

    def __init__(
        self,
        rig: Rig,
        load: Load,
        history: History,
        pause_s: tuple[float, float],
        counts: Callable[[list[int]], bool],
        kinds: Collection[str] = (),
    ) -> None:
        """`counts`: whether such hits of a kind, by what was in flight, are enough. `kinds`: only these; empty: all of them."""
        super().__init__(rig, history)
        self.load, self.pause_s, self.counts = load, pause_s, counts
        self.at_work: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()
        self._hard = asyncio.Lock()
        self.kinds: dict[str, tuple[int, Callable[[Fault], Awaitable[None]]]] = {
            "kill": (8, self._kill),
            "freeze": (5, self._freeze),
            "broker": (2, self._broker),
            "postgres": (2, self._postgres),
            "cut": (4, self._cut),
            "delay": (3, self._delay),
            "half": (3, self._half),
            "rpc_down": (2, self._rpc_down),
            "rpc_stale": (2, self._rpc_stale),
            "rpc_lie": (2, self._rpc_lie),
            "lost_reply": (2, self._lost_reply),
            "lost_send": (3, self._lost_send),
            "reorg": (4, self._reorg),
            "fee_spike": (2, self._fee_spike),
            "partner": (3, self._partner),
            "fuse": (1, self._fuse),
            "rolling": (1, self._rolling),
        }
        self.kinds = {kind: how for kind, how in self.kinds.items() if not kinds or kind in kinds}

    async def work(self) -> None:
        """Mostly a kind that has not hit as often as it must for the run to count, until there is none; else at random by weight."""
        while True:
            await asyncio.sleep(self.random.uniform(*self.pause_s))
            free = [kind for kind in self.kinds if kind not in HARD or not self._hard.locked()]
            if not free:
                continue
            hits = self.history.hits()
            wanted = [kind for kind in free if not self.at_work[kind] and not self.counts(hits.get(kind, []))]
            if not wanted or self.random.random() < 0.3:
                wanted = self.random.choices(free, [self.kinds[name][0] for name in free])
            kind = self.random.choice(wanted)
            task = asyncio.create_task(self._hit(kind))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _hit(self, kind: str) -> None:
        fault = Fault(kind, "", 0)
        self.at_work[kind] += 1
        try:
            if kind in HARD:
                async with self._hard:
                    await self.kinds[kind][1](fault)
            else:
                await self.kinds[kind][1](fault)
        except (aiohttp.ClientError, OSError, TimeoutError, RpcRefused, AssertionError, DevError) as error:
            fault.target += f" ({type(error).__name__})"
        finally:
            fault.until_s = time.time()
            self.at_work[kind] -= 1

    async def heal(self) -> None:
        """Waits for the faults at work to end as they do, then mends whatever is left."""
        for task in list(self.tasks):
            with suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(task, 60)
        for wire in self.rig.wires:
            wire.heal()
        for endpoint in self.rig.endpoints:
            honest(endpoint)
        for name, child in self.rig.stack.children.items():
            child.send_signal(signal.SIGCONT)
            if name in self.rig.down:
                self.rig.restart(name)
        for part in (self.rig.postgres, self.rig.kafka):
            await _started(part)
        await self.rig.control("weather", {})
        await self.rig.control("deliveries", {"drop": 0, "duplicate": 0, "reorder": 0})

    # -- processes ---------------------------------------------------------------------------------------------------

    def _victim(self) -> str:
        return self.random.choice([name for name in self.rig.programs if name not in self.rig.down])

    async def _kill(self, fault: Fault) -> None:
        name = self._victim()
        self.rig.down.add(name)
        self._hits(fault, name)
        await asyncio.to_thread(self.rig.stack.children[name].kill)
        await self._last(0, 4)
        self.rig.restart(name)

    async def _freeze(self, fault: Fault) -> None:
        name = self.random.choice([self._victim(), self._victim(), "circle", "sumsub"])
        self.rig.down.add(name)
        child = self.rig.stack.children[name]
        self._hits(fault, name)
        child.send_signal(signal.SIGSTOP)
        if self.random.random() < 0.5:
            await self._last(1, 12)
        else:  # it wakes when another is about to take its partitions
            await self._last(SESSION_S, SESSION_S + 3)
        child.send_signal(signal.SIGCONT)
        self.rig.down.discard(name)

    async def _rolling(self, fault: Fault) -> None:
        """A new release: every worker is asked to end and started again, one after the other."""
        number = self.random.choice((1, 2))
        names = [f"{movement}-{number}" for movement in self.random.sample(MOVEMENTS, 4)]
        names = [name for name in names if name in self.rig.programs]
        self._hits(fault, ", ".join(names))
        for name in names:
            if name not in self.rig.down:
                self.rig.down.add(name)
                await asyncio.to_thread(self.rig.stack.children[name].stop, timeout_s=20)
                self.rig.restart(name)

    async def _fuse(self, fault: Fault) -> None:
        """Nonsense in a row until a stage stops; an operator starts its workers again with a fuse that bears it."""
        topic = self.random.choice(list(FUSED))
        names = [name for name in self.rig.programs if name.startswith(FUSED[topic])]
        self._hits(fault, topic)
        await self.load.blow(topic, 2 * FUSE_RUN)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:

            async def blown() -> bool:
                return any(["fuse" in (await self.rig.readiness(session, name))[1] for name in names])

            with suppress(AssertionError):
                await self.rig.until(blown, "a fuse is blown", limit_s=30)
                fault.target += ", blown"
        for name in names:
            self.rig.over[name] = {"STABLERAIL_FUSE_RUN_EVENTS_MAX": "100000"}
            self.rig.down.add(name)
            await asyncio.to_thread(self.rig.stack.children[name].stop, timeout_s=20)
            self.rig.restart(name)

    # -- parts -------------------------------------------------------------------------------------------------------

    async def _broker(self, fault: Fault) -> None:
        node = self.random.choice(list(self.rig.kafka.node_ids))
        self._hits(fault, f"broker {node}")
        await asyncio.to_thread(self.rig.kafka.kill, node)
        await self._last(1, 6)
        await asyncio.to_thread(self.rig.kafka.start, node)
        # it catches up; a second one down before that would be a cluster that has lost its minimum
        await asyncio.sleep(5)

    async def _postgres(self, fault: Fault) -> None:
        self._hits(fault, "the server")
        await asyncio.to_thread(self.rig.postgres.stop_immediately)
        await self._last(0.5, 5)
        await _started(self.rig.postgres)

    def _wire(self) -> Any:
        wire = self.random.choice(self.rig.wires)
        return wire, f"{type(wire).__name__} {wire.upstream[1]}"

    async def _cut(self, fault: Fault) -> None:
        wire, name = self._wire()
        self._hits(fault, name)
        if self.random.random() < 0.5:
            await asyncio.to_thread(wire.cut)
        else:
            await asyncio.to_thread(wire.refuse, True)
            await self._last(0.5, 4)
            await asyncio.to_thread(wire.refuse, False)

    async def _delay(self, fault: Fault) -> None:
        wire, name = self._wire()
        self._hits(fault, name)
        wire.delay_s = self.random.uniform(0.05, 0.6)
        await self._last(1, 6)
        wire.delay_s = 0.0

    async def _half(self, fault: Fault) -> None:
        wire, name = self._wire()
        self._hits(fault, name)
        wire.halves = self.random.randrange(1, 6)
        await self._last(1, 4)
        wire.halves = 0

    # -- partners ----------------------------------------------------------------------------------------------------

    async def _partner(self, fault: Fault) -> None:
        kind = self.random.choice(("weather", "hangs", "weather"))
        self._hits(fault, f"circle {kind}")
        if kind == "hangs":
            await self.rig.control("faults", {"path": "*", "kind": "hang", "times": self.random.randrange(1, 6)})
            return
        weather = {"unavailable": 0.4, "lostReplies": 0.2, "limited": 0.3, "seed": self.random.randrange(10**6)}
        await self.rig.control("weather", weather)
        await self._last(3, 10)
        await self.rig.control("weather", {})

    async def _lost_reply(self, fault: Fault) -> None:
        """Circle did what was asked, and nobody hears of it."""
        path = self.random.choice(("/v1/w3s/developer/transactions/transfer", "/v1/w3s/developer/wallets"))
        self._hits(fault, f"circle {path}")
        body = {"path": path, "kind": "lost_reply", "method": "POST", "times": self.random.randrange(1, 4)}
        await self.rig.control("faults", body)


async def _started(part: Any) -> None:
    """One that was just killed may need more than one try."""
    for _ in range(10):
        with suppress(DevError):
            await asyncio.to_thread(part.start)
            return
        await asyncio.sleep(1)
    await asyncio.to_thread(part.start)
