"""How withdrawals end, and that `verify` finds every way in which one could have been paid twice, or its nonce used twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agents.item import read_item
from agents.stage import settle
from agents.withdrawals import settle_withdrawals
from agents.withdrawals.withdrawal import Attempt, Lane, Status, Withdrawal, attempt_row, lane_row, rows_of
from ledger.commit import claim_owners
from ledger.record import unpack
from ledger.rows import Changes, Connection
from ledger.verify import verify
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, assert_holds, broken, connect_to
from tests.support.payouts import CHAIN, asked, open_withdrawal, store
from topics.catalog import BUFFERS_LEVELS, TRANSACTIONS_CONFIRMED
from topics.envelope import headers_of, value_of
from topics.events import TransactionConfirmed

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
filled, books = ledger_rig.filled, ledger_rig.books

STAGE = settle_withdrawals.stage(1)
SIGNER = "0x" + "5" * 40
TO = "0x" + "a" * 40
AMOUNT = 25_000_000


def attempt_of(withdrawal: Withdrawal, nonce: int, status: str, kind: str = "payment") -> Attempt:
    return Attempt(
        CHAIN, f"0x{nonce:064x}", SIGNER, nonce, 1, kind, withdrawal.id, b"raw", 100_000, 9, 9, status, None,
        "0x" + "b" * 64, 7, AT, AT, AT, 1,
    )  # fmt: skip


def confirmed(attempt: Attempt, reason: str = "", **changes: Any) -> TransactionConfirmed:
    given = {
        "chain": CHAIN, "signer": SIGNER, "nonce": attempt.nonce, "tx_hash": attempt.tx_hash,
        "withdrawal_id": attempt.withdrawal_id, "block_hash": attempt.block_hash, "block_number": attempt.block_number,
        "outcome": "reverted" if attempt.status == "reverted" else "confirmed", "reason": reason,
    }  # fmt: skip
    return TransactionConfirmed.model_validate({**given, **changes})


class Desk:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.offset = 0
        self.nonce = 0

    async def open(self, key: str, status: str, kind: str = "payment") -> tuple[Withdrawal, Attempt]:
        withdrawal = asked("ada", AMOUNT, TO, key)
        attempt = attempt_of(withdrawal, self.nonce, status, kind)
        self.nonce += 1
        lane = Lane(CHAIN, SIGNER, self.nonce, 0, "open", "", 1, AT)
        await open_withdrawal(self.connection, withdrawal, attempt_row(attempt), lane_row(lane))
        return withdrawal, attempt

    async def tell(self, *events: TransactionConfirmed) -> list[Any]:
        """Settled in one batch; what was told."""
        key = (TRANSACTIONS_CONFIRMED.name, 0)
        async with self.connection.transaction():
            epochs, _ = await claim_owners(self.connection, STAGE.name, [key], AT)
        items = []
        for event in events:
            self.offset += 1
            headers = headers_of(event.ce_type(), event_id=f"e{self.offset}", source="test", time=AT)
            record = SimpleNamespace(
                topic=key[0],
                partition=0,
                offset=self.offset,
                timestamp=0,
                key=b"k",
                value=value_of(event),
                headers=headers,
            )
            items.append(read_item(STAGE, record))  # type: ignore[arg-type]
        done = await settle(self.connection, STAGE, items, epochs, AT, None)
        assert done.sealed is not None
        return [m for m in unpack(done.sealed.record).messages if m.topic != BUFFERS_LEVELS.name]

    async def statuses(self) -> list[tuple[str, str | None]]:
        return [
            tuple(row)
            for row in await self.connection.fetch("SELECT status, code FROM withdrawals ORDER BY idempotency_key")
        ]


@pytest.fixture
def desk(connection: Connection) -> Desk:
    return Desk(connection)


async def test_payments_reverts_and_cancels_of_one_batch_each_end_their_withdrawal_once(desk: Desk) -> None:
    opened = [
        await desk.open("a", "confirmed"),
        await desk.open("b", "reverted"),
        await desk.open("c", "reverted"),
        await desk.open("d", "confirmed", "cancel"),
    ]
    events = [
        confirmed(attempt, reason) for (_, attempt), reason in zip(opened, ("", "blacklisted", "x", ""), strict=True)
    ]
    told = await desk.tell(*events, *events)
    assert [message.topic for message in told] == ["withdrawals.settled"] * 4
    assert await desk.statuses() == [
        ("completed", None),
        ("failed", "blacklisted"),
        ("failed", "reverted"),
        ("cancelled", None),
    ]
    assert await desk.tell(*reversed(events)) == []
    await assert_holds(desk.connection)


async def test_an_event_that_the_rows_do_not_bear_out_settles_nothing(desk: Desk) -> None:
    withdrawal, attempt = await desk.open("a", "mined")
    _, other = await desk.open("b", "confirmed")
    told = await desk.tell(
        confirmed(attempt),
        confirmed(attempt, withdrawal_id="0" * 32),
        confirmed(attempt, withdrawal_id="not an id"),
        confirmed(other, withdrawal_id=withdrawal.id),
        confirmed(attempt, tx_hash="0xdead"),
    )
    codes = [dict(message.headers)["dlq_code"].decode() for message in told]
    assert codes == [
        "not_final",
        "unknown_withdrawal",
        "unknown_withdrawal",
        "unknown_transaction",
        "unknown_transaction",
    ]
    assert await desk.statuses() == [("broadcasting", None)] * 2
    await assert_holds(desk.connection)


async def test_what_an_event_claims_does_not_pay_what_reverted(desk: Desk) -> None:
    _, attempt = await desk.open("a", "reverted")
    await desk.tell(confirmed(attempt, outcome="confirmed"))
    assert await desk.statuses() == [("failed", "reverted")]
    await assert_holds(desk.connection)


async def test_a_withdrawal_in_review_ends_when_the_chain_has_spoken(desk: Desk) -> None:
    withdrawal, attempt = await desk.open("a", "confirmed")
    changes = Changes()
    changes.upsert(*rows_of(withdrawal._replace(status=Status.MANUAL_REVIEW.value, code="nonce_taken"), "test")[0])
    await store(desk.connection, changes)
    await desk.tell(confirmed(attempt))
    assert await desk.statuses() == [("completed", None)]


# -- verify ------------------------------------------------------------------------------------------------------------


async def fill(dsn: str) -> None:
    """One completed, one failed by a revert, one in flight, one that was refused."""
    connection: Connection = await connect_to(dsn)()
    desk = Desk(connection)
    _, paid = await desk.open("a", "confirmed")
    _, reverted = await desk.open("b", "reverted")
    await desk.open("c", "broadcast")
    await desk.tell(confirmed(paid), confirmed(reverted))
    refused = asked("ada", AMOUNT, TO, "d")._replace(
        status="failed", code="limit_exceeded", hold_id=None, settled_at=AT
    )
    changes = Changes()
    changes.upsert(*rows_of(refused, "test")[0])
    await store(connection, changes)
    await connection.execute("DELETE FROM outbox; UPDATE withdrawals SET updated_at = now() WHERE settled_at IS NULL")
    await connection.close()


async def test_withdrawals_that_nobody_damaged_hold(books: Connection) -> None:
    results = {result.number: result for result in await verify(books)}
    assert [number for number in results if not results[number].holds] == []
    assert (results[7].checked, results[8].checked) == (4, 3)


COPY = (
    "INSERT INTO transactions (id, kind, reference, fingerprint, at, batch)"
    " SELECT gen_random_uuid(), '{kind}', reference, fingerprint, at, 9999 FROM transactions WHERE kind = '{like}' LIMIT 1"
)
ATTEMPT = (
    "INSERT INTO attempts SELECT chain, {hash} AS tx_hash, withdrawal_id, {nonce}, {n}, gas_limit, block_number, signer,"
    " kind, raw, max_fee, priority_fee, status, error, block_hash, signed_at, broadcast_at, updated_at, version"
    " FROM attempts WHERE nonce = 0"
)
DAMAGE = {
    "paid twice in the ledger": ({7, 11}, COPY.format(kind="withdrawal", like="withdrawal")),
    "released after it was paid": ({7, 11}, COPY.format(kind="withdrawal_release", like="withdrawal")),
    "paid after it was released": ({7, 11}, COPY.format(kind="withdrawal", like="withdrawal_release")),
    "held twice": ({7, 11}, COPY.format(kind="withdrawal_hold", like="withdrawal_hold")),
    "completed without a payment in the ledger": (
        {7},
        "UPDATE withdrawals SET status = 'completed', settled_at = updated_at WHERE status = 'broadcasting'",
    ),
    "failed without its release": (
        {7},
        "UPDATE withdrawals SET status = 'failed', settled_at = updated_at WHERE status = 'broadcasting'",
    ),
    "not ended any more": (
        {7},
        "UPDATE withdrawals SET status = 'confirming', settled_at = NULL, updated_at = now() WHERE status = 'completed'",
    ),
    "a hold for less": ({7}, "UPDATE withdrawals SET amount = amount + 1 WHERE status = 'broadcasting'"),
    "a hold that nobody opened": (
        {7},
        "UPDATE withdrawals SET hold_id = gen_random_uuid() WHERE code = 'limit_exceeded'",
    ),
    "in flight without a hold": ({7}, "UPDATE withdrawals SET hold_id = NULL WHERE status = 'broadcasting'"),
    "a withdrawal deleted": ({7}, "DELETE FROM withdrawals WHERE status = 'completed'"),
    "completed by a transaction that is not final": (
        {7},
        "UPDATE attempts SET status = 'mined' WHERE status = 'confirmed'",
    ),
    "failed though its payment is final": ({7}, "UPDATE attempts SET status = 'confirmed' WHERE status = 'reverted'"),
    "in flight without a transaction": ({7, 8}, "DELETE FROM attempts WHERE status = 'broadcast'"),
    "a second nonce for one withdrawal": (
        {7},
        ATTEMPT.format(hash="'0x2'", nonce=3, n=1) + "; UPDATE attempts SET status = 'broadcast' WHERE nonce = 3;"
        " UPDATE lanes SET next_nonce = 4",
    ),
    "two mined transactions of one nonce": ({7, 8}, ATTEMPT.format(hash="'0x2'", nonce=0, n=2)),
    "one nonce for two withdrawals": (
        {7, 8},
        "UPDATE attempts SET nonce = 1, n = 2 WHERE nonce = 2; UPDATE lanes SET next_nonce = 2;"
        "UPDATE attempts SET withdrawal_id = (SELECT withdrawal_id FROM attempts WHERE nonce = 0) WHERE n = 2",
    ),
    "a gap that stops what follows": (
        {8},
        "UPDATE attempts SET nonce = 3 WHERE nonce = 2; UPDATE lanes SET next_nonce = 4",
    ),
    "a nonce given away that is used": ({8}, "UPDATE lanes SET next_nonce = 2"),
    "a nonce lost": ({8}, "UPDATE lanes SET next_nonce = 4"),
    "a lane deleted": ({8}, "DELETE FROM lanes"),
    "in flight for days": (
        {13},
        "UPDATE withdrawals SET updated_at = now() - interval '2 days' WHERE status = 'broadcasting'",
    ),
}


@pytest.mark.parametrize(("wanted", "statement"), DAMAGE.values(), ids=[name.replace(" ", "_") for name in DAMAGE])
async def test_damage_to_a_withdrawal_is_found(wanted: set[int], statement: str, books: Connection) -> None:
    done = await books.execute(statement)
    assert not done.endswith(" 0"), "the damage was done"
    assert await broken(books) == wanted


async def test_a_nonce_that_somebody_else_used_is_no_gap(books: Connection) -> None:
    await books.execute("UPDATE attempts SET nonce = 3 WHERE nonce = 2")
    await books.execute("UPDATE lanes SET next_nonce = 4, chain_nonce = 3")
    assert await broken(books) == set()
