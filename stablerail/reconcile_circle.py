"""The custody mirror against Circle's word about our wallets.

| chain | compared | no difference |
| --- | --- | --- |
| one that we read | each wallet that holds USDC by Circle's word, and the sum of the others, with the chain | what moved between the final block and the head |
| another | the sum of Circle's words with the mirror | deposits that are not final, transfers that Circle is making |

Circle lists wallets in pages of fifty; ours are looked up page by page, so that nothing grows with the number of customers. What
differs is asked again before it is told: it may have been on its way. Wallets of the account that are neither known to us nor in a
wallet set of ours are none of our business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple, TypeVar

from chain.heads import readable
from chain.rpc import Rpc
from connectors.circle.chains import EVM_CHAINS, Network, to_circle
from connectors.circle.client import CircleClient, WalletHolding
from connectors.errors import ConnectorError, RateLimited, Refused, Unknown
from ledger.accounts import custody as custody_account
from ledger.reconciling import Comparison, Difference, Found
from ledger.rows import Connection
from ledger.sql import load
from stablerail.custody import ADDRESSES_MAX, Custody
from topics.events import Chain
from topics.money import parse_amount

_sql = load("stablerail", "custody.sql")

LOOKS: Final = 3
LOOK_PAUSE_S: Final = 3.0
"""Between two looks at what differs: longer than a report takes from the chain into the ledger."""
SECOND_LOOKS_MAX: Final = 20
"""Of a chain's wallets: where all differ, waiting for each would take days."""
TRIES: Final = 4
TRY_PAUSE_S: Final = 1.0

T = TypeVar("T")


class _Sides(NamedTuple):
    """Base units of one look."""

    ledger: int
    circle: int
    differs: bool


class _Block(NamedTuple):
    rpc: Rpc
    final: int
    head: int


@dataclass
class CircleWord:
    """Asks Circle about one chain."""

    client: CircleClient
    network: Network
    chain: Chain
    token_id: str
    wallet_sets: frozenset[str]
    custody: Custody | None
    """None: the chain is one that we do not read."""
    progress: Callable[[str, int, int], None]
    second_looks: int = field(default_factory=lambda: SECOND_LOOKS_MAX)

    async def compare(self, connection: Connection, found: Found) -> None:
        """Raises ConnectorError when Circle does not answer, ChainError when the chain cannot be read."""
        address = await asked(partial(self.client.token_address, self.token_id))
        for look in range(LOOKS):
            if look:
                await asyncio.sleep(LOOK_PAUSE_S)
            sides = await self._look(connection, address, found if look == 0 else Found())
            if not sides.differs:
                break
        found.compared(Comparison.CIRCLE)
        if sides.differs:
            account = str(custody_account(self.chain.value))
            found.differ(Difference(Comparison.CIRCLE, "", account, sides.ledger, sides.circle))

    async def _look(self, connection: Connection, token: str, found: Found) -> _Sides:
        block = None
        if self.custody is not None:
            source = await readable(self.custody.rpcs)
            block = _Block(source.rpc, max(source.head.number - self.custody.depth_blocks, 0), source.head.number)
        circle = on_chain = wallets = 0
        async for page in self._pages(token):
            held = await self._known(connection, page, found)
            circle += sum(amount for _, amount, _ in held)
            if block is not None:
                on_chain += await self._wallets(block, token, held, found)
            wallets += len(page)
            self.progress(f"{self.chain}: wallets at Circle", wallets, 0)
        if block is None:
            return await self._by_word(connection, circle)
        all_of_them = await self._on_chain(connection, block)
        return _Sides(all_of_them, circle, all_of_them != on_chain)

    async def _pages(self, token: str) -> AsyncIterator[list[WalletHolding]]:
        name = to_circle(self.chain, self.network)
        after: str | None = None
        while True:
            page, following = await asked(partial(self.client.holdings_page, name, self.token_id, token, after=after))
            yield page
            if following is None:
                return
            if following == after:
                raise Unknown("Circle's pages do not go on")
            after = following

    async def _known(
        self, connection: Connection, page: Sequence[WalletHolding], found: Found
    ) -> list[tuple[WalletHolding, int, str]]:
        """Those that are ours, with base units and customer."""
        rows = await connection.fetch(_sql.known, self.chain.value, [self._plain(one.address) for one in page])
        owners: Mapping[str, str] = dict(map(tuple, rows))
        held = []
        for one in page:
            address, amount = self._plain(one.address), units(one.amount)
            if address in owners:
                held.append((one, amount, owners[address]))
            elif amount and one.wallet_set_id in self.wallet_sets:
                found.compared(Comparison.CIRCLE)
                found.differ(Difference(Comparison.CIRCLE, "", f"{self.chain}:{address}", None, amount))
        found.compared(Comparison.CIRCLE, len(held))
        return held

    async def _wallets(
        self, block: _Block, token: str, held: Sequence[tuple[WalletHolding, int, str]], found: Found
    ) -> int:
        """Tells wallets that Circle sees otherwise than the chain. What the chain says they hold at the final block, in all."""
        assert self.custody is not None
        addresses = [self._plain(one.address) for one, _, _ in held]
        finals = await block.rpc.balances_of(self.custody.token, addresses, block.final)
        for address, final, (one, amount, user) in zip(addresses, finals, held, strict=True):
            if amount != final and await self._differs(block, address, final, amount):
                value = await self._again(token, address, one)
                if value is not None:
                    found.differ(Difference(Comparison.CIRCLE, user, f"{self.chain}:{address}", *value))
        return sum(finals)

    async def _differs(self, block: _Block, address: str, final: int, amount: int) -> bool:
        assert self.custody is not None
        (newest,) = await block.rpc.balances_of(self.custody.token, [address], block.head)
        return not min(final, newest) <= amount <= max(final, newest)

    async def _again(self, token: str, address: str, one: WalletHolding) -> tuple[int, int] | None:
        """What the two still say of a wallet after further looks; None when they agree."""
        assert self.custody is not None
        looks = LOOKS - 1 if self.second_looks > 0 else 1
        self.second_looks -= 1
        for _ in range(looks):
            if self.second_looks >= 0:
                await asyncio.sleep(LOOK_PAUSE_S)
            source = await readable(self.custody.rpcs)
            block = _Block(source.rpc, max(source.head.number - self.custody.depth_blocks, 0), source.head.number)
            amount = units(await asked(partial(self.client.holding, one.id, self.token_id, token)))
            (final,) = await block.rpc.balances_of(self.custody.token, [address], block.final)
            if not await self._differs(block, address, final, amount):
                return None
        return final, amount

    async def _on_chain(self, connection: Connection, block: _Block) -> int:
        assert self.custody is not None
        total, last = 0, ""
        while True:
            rows = await connection.fetch(_sql.at_circle, self.chain.value, last, ADDRESSES_MAX)
            addresses = [row[0] for row in rows]
            total += sum(await block.rpc.balances_of(self.custody.token, addresses, block.final))
            if len(addresses) < ADDRESSES_MAX:
                return total
            last = addresses[-1]

    async def _by_word(self, connection: Connection, circle: int) -> _Sides:
        row = await connection.fetchrow(_sql.by_word, self.chain.value)
        assert row is not None
        mirror, leaving, coming = (int(value) for value in row)
        return _Sides(mirror, circle, not mirror - leaving <= circle <= mirror + coming)

    def _plain(self, address: str) -> str:
        return address.lower() if self.chain in EVM_CHAINS else address


async def asked(ask: Callable[[], Awaitable[T]]) -> T:
    """Reading is repeated, within reason; a refusal is not. Raises ConnectorError."""
    for _ in range(TRIES - 1):
        try:
            return await ask()
        except Refused:
            raise
        except RateLimited as error:
            await asyncio.sleep(min(error.retry_after_s or TRY_PAUSE_S, 60.0))
        except ConnectorError:
            await asyncio.sleep(TRY_PAUSE_S)
    return await ask()


def units(amount: str) -> int:
    """Base units of Circle's text. Raises Unknown."""
    try:
        return parse_amount(amount)
    except ValueError:
        raise Unknown("Circle's reply holds an amount that cannot be read") from None
