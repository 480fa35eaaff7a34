"""What customers, partners and the chain do, drawn from a seed: approvals, deposits told thrice, orders, withdrawals on both rails,
duplicates, disorder, nonsense. As many events are in flight as were asked for, not so many a second: a slow machine has a slow load.

What becomes of each input must not depend on luck, or nobody could judge it: what a customer spends was funded before the faults
began (`Customer.left`), and what must be refused is far beyond it. Where luck may decide (a cancellation), both ends are right and the
chain says which it was.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import base58

from stablerail.dev.usdc import calldata
from tests.chaos.asking import ERRORS, Asking
from tests.chaos.inputs import History
from tests.chaos.rig import Rig

FUNDED: Final = 100_000 * 10**6
FIRST: Final = 4
"""Customers that are funded before the faults begin."""
WEIGHTS: Final = {
    "approve": 1, "deposit": 6, "twins": 2, "dust": 1, "inject": 4, "ghost": 1, "withdraw": 7, "by_kafka": 3, "by_circle": 4,
    "refused": 2, "cancelled": 2, "order": 6, "nonsense": 2,
}  # fmt: skip
NONSENSE_AT: Final = ("deposits.notified", "withdrawals.requested", "orders.placed", "orders.filled", "kyc.approved")


def money(amount: int) -> str:
    return f"{amount // 10**6}.{amount % 10**6:06d}"


@dataclass
class Customer:
    """`left`: what may still be spent of what was final before the faults began."""

    user: str
    addresses: dict[str, str] = field(default_factory=dict)
    """By Circle's name of the chain."""
    left: int = 0

    def spend(self, amount: int) -> int:
        assert amount <= self.left, f"{self.user} has spent everything"
        self.left -= amount
        return amount


class Load(Asking):
    """`issue` makes one thing happen; what a faulty world does not take is asked again by a task until it does."""

    def __init__(self, rig: Rig, history: History, weights: Mapping[str, int]) -> None:
        super().__init__(rig, history)
        self.weights = {**WEIGHTS, **weights}
        self.random = random.Random(f"load {history.seed}")
        self.customers: list[Customer] = []
        self.number = 0

    # -- before the faults -------------------------------------------------------------------------------------------

    async def fund(self, limit_s: float) -> bool:
        """The first customers, each with money that is final. False: it does not come, though nothing was broken."""
        for _ in range(FIRST):
            self._approve()
        try:
            await self.rig.until(self._all_have_wallets, "the first customers' wallets", limit_s=limit_s)
            for customer in self.customers:
                await self._pay(customer, [FUNDED], "deposit")
            await self.rig.until(self._all_done, "the first customers' money is final", limit_s=limit_s)
        except AssertionError:
            return False
        for customer in self.customers:
            customer.left = FUNDED
        return True

    async def _all_have_wallets(self) -> bool:
        await self.look()
        return all(customer.addresses for customer in self.customers)

    async def _all_done(self) -> bool:
        await self.look()
        return not self.history.in_flight

    # -- one thing ---------------------------------------------------------------------------------------------------

    async def issue(self) -> None:
        kind = self.random.choices(list(self.weights), list(self.weights.values()))[0]
        rich = self.random.choice(self.customers[:FIRST])
        anyone = self.random.choice([one for one in self.customers if one.addresses])
        try:
            match kind:
                case "approve":
                    self._approve()
                case "deposit" | "twins" | "dust":
                    amount = self._amount(1, 400) if kind != "dust" else self.random.randrange(1, 10**6)
                    await self._pay(anyone, [amount] * (2 if kind == "twins" else 1), "deposit")
                case "inject":
                    await self._inject(anyone)
                case "ghost":
                    self._ghost(anyone)
                case "order":
                    self._order(rich)
                case "nonsense":
                    self._nonsense(self.random.choice(NONSENSE_AT))
                case _:
                    self._withdraw(rich, kind)
        except ERRORS:
            pass  # the chain or the sandbox was away: it has not happened

    def _amount(self, least: int, most: int) -> int:
        return self.random.randrange(least * 10**6, most * 10**6)

    def _name(self, kind: str) -> str:
        self.number += 1
        return f"{kind}-{self.history.seed}-{self.number}"

    def _approve(self) -> None:
        customer = Customer(self._name("user"))
        self.customers.append(customer)
        made = self.history.add("approve", customer.user, customer.user)

        async def told() -> None:  # the vendor gives up after a minute, and people press the button again
            while not made.is_done:
                try:
                    await self.rig.stack.approve(customer.user)
                except (*ERRORS, Exception):
                    await asyncio.sleep(1)
                    continue
                for _ in range(20):
                    await asyncio.sleep(0 if made.is_done else 1)

        self._later(told())

    async def _pay(self, customer: Customer, amounts: list[int], kind: str) -> None:
        """A transfer on the chain, or several equal ones in one transaction; now and then a partner tells of it too."""
        to = customer.addresses["MATIC-AMOY"].lower()
        usdc = self.rig.usdc
        if len(amounts) == 1:
            tx = {"from": usdc.payer, "to": usdc.address, "data": calldata("transfer(address,uint256)", to, amounts[0])}
        else:
            calls = [calldata("transfer(address,uint256)", to, amount)[2:] for amount in amounts]
            tx = {"from": usdc.payer, "to": usdc.batch, "data": "0x" + "".join(calls)}
        tx_hash = await self.rig.anvil.rpc("eth_sendTransaction", tx | {"gas": hex(400_000)})
        self.history.add(kind, customer.user, tx_hash, chain="MATIC", to=to, amounts=amounts)
        if len(amounts) == 1 and self.random.random() < 0.3:
            self._report(to, tx_hash, amounts[0], self.random.choice((1, 1, 2)))

    def _report(self, to: str, tx_hash: str, amount: int, times: int = 1) -> None:
        content = {
            "version": 1, "source": "partner", "transfer_id": tx_hash, "chain": "MATIC", "tx_hash": tx_hash, "to": to,
            "asset": "USDC", "amount": money(amount), "evidence": "seen",
        }  # fmt: skip
        for _ in range(times):
            self._say("deposits.notified", to, content)

    def _ghost(self, customer: Customer) -> None:
        """A partner tells of a transfer that nobody ever made: what is credited for it is taken back."""
        to, tx_hash, amount = (
            customer.addresses["MATIC-AMOY"].lower(),
            "0x" + secrets.token_hex(32),
            self._amount(1, 50),
        )
        self.history.add("ghost", customer.user, tx_hash, chain="MATIC", to=to, amounts=[amount])
        self._report(to, tx_hash, amount)

    async def _inject(self, customer: Customer) -> None:
        """An inbound transaction at Circle on a chain that nobody but Circle reads."""
        for name in ("duplicate", "reorder", "drop"):
            if self.random.random() < 0.15:
                await self.rig.control("deliveries", {name: 2 if name == "reorder" else 1})
        tx_hash, amount = base58.b58encode(secrets.token_bytes(64)).decode(), self._amount(1, 300)
        to = customer.addresses["SOL-DEVNET"]
        body = {"blockchain": "SOL-DEVNET", "address": to, "amount": money(amount), "txHash": tx_hash}
        made = self.history.add("inject", customer.user, tx_hash, chain="SOL", to=to, amounts=[amount])
        try:
            await self.rig.control("transfers", body)
        except ERRORS:
            made.about["doubtful"] = True  # Circle's own record says whether it was

    # -- orders ------------------------------------------------------------------------------------------------------

    def _order(self, customer: Customer) -> None:
        order = self._name("order")
        draw = self.random.random()
        if draw < 0.1:
            amount = 10**15
            self.history.add("order", customer.user, order, amount=amount, fills=[], end="rejected")
            self._say("orders.placed", order, {"order_id": order, "user_id": customer.user, "amount": money(amount)})
            return
        amount = customer.spend(self._amount(5, 60))
        parts = sorted(self.random.sample(range(1, amount), self.random.randrange(1, 4)))
        fills = [after - before for before, after in zip([0, *parts], parts, strict=False)]
        end = "filled" if draw < 0.7 else "cancelled" if draw < 0.9 else "expired"
        self.history.add("order", customer.user, order, amount=amount, fills=fills, end=end)
        total = money(sum(fills))
        said = [("orders.placed", {"order_id": order, "user_id": customer.user, "amount": money(amount)})]
        for number, part in enumerate(fills):
            last = {"filled_total": total} if end == "filled" and number == len(fills) - 1 else {}
            said.append(
                ("orders.filled", {"order_id": order, "fill_id": f"{order}.{number}", "amount": money(part)} | last)
            )
        if end != "filled":
            said.append((f"orders.{end}", {"order_id": order, "filled_total": total}))
        if self.random.random() < 0.3:
            said += self.random.sample(said, 1)
        if self.random.random() < 0.3:
            self.random.shuffle(said)
        for topic, content in said:
            self._say(topic, order, content)

    # -- withdrawals -------------------------------------------------------------------------------------------------

    def _withdraw(self, customer: Customer, kind: str) -> None:
        key = self._name("pay")
        to, chain, rail, expect = "0x" + secrets.token_hex(20), "MATIC", "chain", "paid"
        amount = self._amount(1, 40)
        if kind == "by_circle":
            rail = "circle"
            if self.random.random() < 0.4:
                chain, to = "SOL", base58.b58encode(secrets.token_bytes(32)).decode()
        if kind == "refused":
            expect = "refused"
            amount, to = self.random.choice(((10**12 - 1, to), (amount, "0x1234"), (amount, self.rig.usdc.address)))
        else:
            customer.spend(amount)
        if kind == "cancelled":
            expect = "either"
        body = {
            "user_id": customer.user,
            "chain": chain,
            "asset": "USDC",
            "amount": money(amount),
            "to": to,
            "rail": rail,
        }
        about = {"chain": chain, "to": to, "amount": amount, "rail": rail, "expect": expect}
        made = self.history.add("withdraw", customer.user, key, **about)
        if kind == "by_kafka":
            for _ in range(self.random.choice((1, 1, 2))):
                self._say("withdrawals.requested", customer.user, body | {"idempotency_key": key})
        else:
            self._later(self._ask(made, body, self.random.choice((1, 1, 2)), cancel=kind == "cancelled"))

    # -- messages ----------------------------------------------------------------------------------------------------

    def _nonsense(self, topic: str) -> None:
        junk = self.random.choice(
            (b"\x00\xff", b"{", b"[]", b'{"version": 7}', b"null", b'{"amount": "1e9"}', b"\xf0" * 50)
        )
        value = junk + b" " + self._name("junk").encode()
        made = self.history.add("malformed", "", value.hex(), topic=topic)

        async def send() -> None:
            at = await self._produce(topic, secrets.token_bytes(4), value)
            made.about |= {"partition": at.partition, "offset": at.offset}

        self._later(send())

    async def blow(self, topic: str, number: int) -> None:
        """More nonsense in a row than a fuse bears."""
        partition_key = secrets.token_bytes(4)
        for _ in range(number):
            value = b"{ " + self._name("fuse").encode()
            made = self.history.add("malformed", "", value.hex(), topic=topic)
            at = await self._produce(topic, partition_key, value)
            made.about |= {"partition": at.partition, "offset": at.offset}

    # -- how far it is -----------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Marks what has come to its end. Raises what the database raises while it is away."""
        waiting = [one for one in self.history.inputs if not one.is_done]
        if not waiting:
            return
        await self._look_for_wallets()
        deposits: dict[str, list[str]] = {}
        for tx_hash, status in await self.rig.rows("SELECT tx_hash, status FROM deposits"):
            deposits.setdefault(tx_hash, []).append(status)
        withdrawals = dict(await self.rig.rows("SELECT idempotency_key, status FROM withdrawals"))
        orders = dict(await self.rig.rows("SELECT order_id, status FROM orders"))
        letters = {value for (value,) in await self.rig.rows("SELECT value FROM dead_letters")}
        for one in waiting:
            match one.kind:
                case "approve":
                    one.is_done = any(customer.user == one.key and customer.addresses for customer in self.customers)
                case "deposit" | "inject" | "ghost":
                    found = deposits.get(one.key, [])
                    ended = {"finalized", "reversed", "parked", "vanished"}
                    one.is_done = len(found) >= len(one.about["amounts"]) and set(found) <= ended
                case "withdraw":
                    one.is_done = withdrawals.get(one.key) in ("completed", "failed", "cancelled")
                case "order":
                    one.is_done = orders.get(one.key) in ("filled", "cancelled", "expired", "rejected")
                case "malformed":
                    one.is_done = bytes.fromhex(one.key) in letters

    async def settled(self) -> bool:
        """Whether everything has come to its end; of what may have vanished the chain and Circle are asked."""
        try:
            await self.look()
            for one in [one for one in self.history.inputs if not one.is_done]:
                if one.kind == "deposit" and await self.rig.anvil.rpc("eth_getTransactionReceipt", one.key) is None:
                    found = await self.rig.rows("SELECT status FROM deposits WHERE tx_hash = $1", one.key)
                    pooled = await self.rig.anvil.rpc("eth_getTransactionByHash", one.key)
                    one.is_done = pooled is None and {row[0] for row in found} <= {"reversed", "vanished"}
                elif one.about.get("doubtful"):
                    made = await self.rig.control("created")
                    one.is_done = all(each.get("txHash") != one.key for each in made["transactions"])
        except ERRORS:
            return False
        return not self.history.in_flight and all(task.done() for task in self.tasks)

    async def _look_for_wallets(self) -> None:
        if all(customer.addresses for customer in self.customers):
            return
        found: dict[str, dict[str, str]] = {}
        names = {"MATIC": "MATIC-AMOY", "SOL": "SOL-DEVNET"}
        for user, chain, address in await self.rig.rows("SELECT user_id, chain, address FROM wallets"):
            found.setdefault(user, {})[names.get(chain, chain)] = address
        for customer in self.customers:
            if len(found.get(customer.user, ())) == 4:
                customer.addresses = found[customer.user]
