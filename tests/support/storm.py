"""A worker of withdrawals on a chain whose blocks cost what the test says, and lose what the test says: for what is stuck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.outcome import Alert
from agents.withdrawals import wishes
from agents.withdrawals.raising import RaisePolicy
from agents.withdrawals.withdrawal import Withdrawal
from chain.fees import GWEI
from ledger.accounts import pending_withdrawal, spendable
from ledger.record import Message
from tests.support.ledger_rig import assert_holds, balance
from tests.support.sending import Process, Sending, messages
from topics.catalog import TRANSACTIONS_CONFIRMED

BLOCKS = 3
RULE = RaisePolicy(blocks=BLOCKS, attempts_max=3, stuck_s=1_800)


@dataclass
class Storm:
    """A worker on a chain whose blocks cost what the test says."""

    desk: Sending
    process: Process
    base_fee: int = GWEI
    alerts: list[Alert] = field(default_factory=list)

    async def sent(self, number: int = 1) -> list[Withdrawal]:
        """Accepted, signed, and in the node's pool."""
        asked = await self.desk.ask(number)
        await self.desk.sent(self.process, await self.desk.signed(self.process, *asked))
        return asked

    async def mine(self) -> None:
        await self.desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(self.base_fee))
        await self.desk.anvil.mine()

    async def heads(self, number: int = 1, *, send: bool = True) -> list[Message]:
        """So many blocks; each head through every stage that it wakes, and what follows from that. What raise_fees told."""
        told: list[Message] = []
        for _ in range(number):
            await self.mine()
            head = await self.desk.newest()
            tracked = messages(await self.desk.run(self.process, self.process.track, head))
            for message in tracked:
                if message.topic == TRANSACTIONS_CONFIRMED.name:
                    await self.desk.run(self.process, self.process.settling, message)
            told += await self.raised(head)
            if send and told:
                await self.desk.sent(self.process, told)
        return told

    async def raised(self, head: Message, process: Process | None = None) -> list[Message]:
        process = process or self.process
        settled = await self.desk.run(process, process.raising, head)
        self.alerts += settled.alerts
        return messages(settled)

    async def lose(self) -> None:
        """The pools are empty: nobody has what we sent."""
        await self.desk.anvil.rpc("anvil_dropAllTransactions")

    async def wish(self, withdrawal: Withdrawal, kind: str, attempts_max: int = RULE.attempts_max) -> wishes.Wish:
        at = self.desk.now
        return await wishes.ask(
            self.desk.connection, withdrawal.id, kind, attempts_max, self.desk.fees, "a test", at, "ann"
        )

    async def attempts(self) -> list[tuple[int, int, str, str]]:
        """(nonce, n, kind, status)"""
        rows = await self.desk.connection.fetch("SELECT nonce, n, kind, status FROM attempts ORDER BY nonce, n")
        return [(nonce, n, kind, status) for nonce, n, kind, status in rows]

    async def status(self, withdrawal: Withdrawal) -> tuple[str, str | None]:
        return await self.desk.status(withdrawal)

    async def money(self, withdrawal: Withdrawal) -> tuple[int, int]:
        """(spendable, held) of its customer."""
        user, at = withdrawal.user_id, self.desk.connection
        return await balance(at, spendable(user)) or 0, await balance(at, pending_withdrawal(user)) or 0

    async def paid(self) -> list[str]:
        return sorted(to for to, _ in await self.desk.paid())

    async def assert_paid(self, asked: Sequence[Withdrawal]) -> None:
        assert [await self.status(one) for one in asked] == [("completed", None)] * len(asked)
        assert await self.paid() == sorted(one.recipient for one in asked)
        assert [held for one in asked for held in [(await self.money(one))[1]]] == [0] * len(asked)
        await assert_holds(self.desk.connection)
