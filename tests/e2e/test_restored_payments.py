"""A backup from before a hundred payments, restored and brought forward when the database is lost in the middle of them.

Real processes and the commands that a person runs, in their order: pg_dump, kill and loss, pg_restore, `migrate`, `rebuild`, a
worker, `recovery open`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support.proxies import http_request, produce
from tests.support.withdrawal_points import SETTINGS, commit_of
from tests.support.withdrawal_rig import CHAIN, WithdrawalRig, withdrawal_rig
from tests.support.worker_rig import PATIENCE_S

COMPLETED, MINED, MINED_UNSEEN, SENT, SIGNED, SIGNED_UNSAID, ACCEPTED_UNSAID, ASKED = 30, 16, 8, 16, 10, 5, 9, 6
"""A hundred, by how far they are. `unsaid`: by a commit that has not reached Kafka."""
ON_CHAIN = COMPLETED + MINED + MINED_UNSEEN + SENT


def program(command: list[str | Path]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def stablerail(rig: WithdrawalRig, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a command as a person runs it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "stablerail.cli", *arguments, env={**rig.settings, "STABLERAIL_ACTOR": "ann"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def attempts(rig: WithdrawalRig, status: str) -> int:
    return int(await rig.database.fetchval("SELECT count(*) FROM attempts WHERE status = $1", status))


async def pay(rig: WithdrawalRig) -> None:
    """A hundred payments, each group as far as its name says."""

    async def until_attempts(status: str, count: int) -> None:
        async def so_many() -> bool:
            return await attempts(rig, status) == count

        await rig.until(so_many, f"{count} are {status}")

    before = len(rig.asked)
    async with rig.blocks():
        await rig.ask(COMPLETED)

        async def told() -> bool:
            return await rig.ended() == before + COMPLETED

        await rig.until(told, "the first are paid")
    await rig.until(rig.heads_settled, "no head is left that could find the next ones mined")
    await rig.ask(MINED)
    await until_attempts("broadcast", MINED)
    await rig.anvil.mine()
    await rig.head()
    await until_attempts("mined", MINED)
    await rig.until(rig.heads_settled, "nor this one")
    await rig.ask(MINED_UNSEEN)
    await until_attempts("broadcast", MINED_UNSEEN)
    await rig.anvil.mine()
    await rig.ask(SENT)
    await until_attempts("broadcast", MINED_UNSEEN + SENT)
    sending = rig.rpc.hold(http_request("POST", body_contains="eth_sendRawTransaction"))
    await rig.ask(SIGNED)
    await sending.wait_hit_async(PATIENCE_S)
    await rig.until(rig.is_idle, "the journal has the signatures")
    signing = rig.postgres.hold(commit_of("sign_transactions"))
    await rig.ask(SIGNED_UNSAID)
    await signing.wait_hit_async(PATIENCE_S)
    await rig.until(rig.is_idle, "the journal has what was before")
    journal = rig.kafka.hold(produce(rig.topic("journal")))
    assert signing.release()
    await journal.wait_hit_async(PATIENCE_S)
    await rig.ask(ACCEPTED_UNSAID)

    async def accepted() -> bool:
        count = await rig.database.fetchval("SELECT count(*) FROM withdrawals WHERE status = 'signing'")
        return int(count) == ACCEPTED_UNSAID

    await rig.until(accepted, "the last are accepted, and the journal does not know")
    rig.holds += [sending, signing, journal]
    rig.worker.kill()
    for hold in (sending, journal):
        assert not hold.release(), "a dead client's packet does not go on"
    assert await attempts(rig, "signed") == SIGNED + SIGNED_UNSAID
    await rig.ask(ASKED)
    assert len(rig.asked) == before + 100


async def used_nonces(rig: WithdrawalRig) -> int:
    """With those of the node's pool."""
    return int(await rig.anvil.rpc("eth_getTransactionCount", rig.signer, "pending"), 16)


@pytest.mark.asyncio
async def test_a_backup_from_before_a_hundred_payments_goes_on_and_each_is_paid_once(
    scratch: Path, postgres: Postgres, kafka: Kafka, tools: Tools, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "STABLERAIL_WITHDRAWAL_IN_FLIGHT_MAX": "100"}
    async with withdrawal_rig(scratch, postgres, kafka, tools, settings) as rig:
        dsn, backup = rig.settings["STABLERAIL_DATABASE_URL"], tmp_path / "backup"
        name = urlsplit(dsn).path[1:]
        await asyncio.to_thread(program, [tools.postgres_bin / "pg_dump", "-Fc", "-f", backup, dsn])
        before = len(rig.asked)
        await pay(rig)

        await rig.database.close()
        postgres.drop_database(name)
        postgres.create_database(name)
        await asyncio.to_thread(program, [tools.postgres_bin / "pg_restore", "--no-owner", "-d", dsn, backup])
        code, said = await stablerail(rig, "migrate")
        assert code == 0, said
        code, said = await stablerail(rig, "rebuild", "--take-over")
        assert code == 0, said
        await rig.connect()

        rig.start_worker()
        async with rig.blocks():

            async def settled() -> bool:
                left = await rig.database.fetchval("SELECT count(*) FROM withdrawals WHERE status = 'signing'")
                waits = SIGNED_UNSAID + ACCEPTED_UNSAID + ASKED
                return (await rig.ended(), left) == (before + ON_CHAIN, waits)

            await rig.until(settled, "what had left is settled, what was asked for is accepted")
        assert await used_nonces(rig) == before + ON_CHAIN, "nothing was sent"
        assert await rig.database.fetchval("SELECT count(*) FROM attempts") == before + ON_CHAIN + SIGNED, "nor signed"
        lane = f"{CHAIN}:{rig.signer}"
        code, said = await stablerail(rig, "lanes", "open", lane)
        assert (code, said.startswith("lane_restored: ")) == (1, True), said
        code, said = await stablerail(rig, "recovery", "status")
        assert (code, lane in said, "partner:circle" in said) == (0, True, True), said
        code, said = await stablerail(rig, "recovery", "open", "--lane", lane)
        assert code == 0, said
        rig.raises = True  # what waited for this is due to be sped up as soon as it is sent

        await rig.check()
        rows = await rig.database.fetch(
            "SELECT nonce FROM attempts GROUP BY nonce HAVING count(DISTINCT withdrawal_id) > 1"
        )
        assert rows == [], "no nonce was signed for two payments"
