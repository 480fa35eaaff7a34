"""No key material leaves: after a run with everything that goes wrong, all that was written and said is searched for it."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import zstandard

from agents.onboarding.control import trigger
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from ledger.record import BYTES_MAX
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from stablerail.telemetry import configure_logging
from tests.support.in_process import read_topic
from tests.support.wallet_rig import Rig, wallet_rig, with_policy
from topics.catalog import JOURNAL, KYC_APPROVED, WALLETS_PROVISIONED, WALLETS_REQUESTED

PATH = "/v1/w3s/developer/wallets"


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


@pytest.fixture
def logs_as_in_production() -> None:
    configure_logging("json", "debug")


def forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret).rstrip(b"=")[:-1]]


async def test_no_key_is_in_any_table_topic_metric_or_log_of_a_run_that_went_wrong(
    rig: Rig, capfd: pytest.CaptureFixture[str], logs_as_in_production: None
) -> None:
    gate, state = rig.circle.sandbox.gate, rig.circle.sandbox.state
    for kind, status in (("status", 500), ("lost_reply", 500), ("status", 429), ("status", 401)):
        gate.faults.append(Fault(path=PATH, kind=kind, status=status))  # type: ignore[arg-type]
    state.refused = {"user-2"}
    await rig.approve(*(f"user-{n}" for n in range(5)))
    async with rig.worker(with_policy(attempts_max=8)) as services:
        await rig.ended(Counter(completed=4, failed=1), "all but one", step_s=20)
        connection = await rig.at.connect()
        await trigger(connection, "user-2", "ann", rig.at.clock())
        await connection.close()
        await rig.ended(Counter(completed=4, failed=1), "refused again")
        metrics = services.observer
        assert isinstance(metrics, Metrics)
        said = {"metrics": metrics.render()}
    said["logs"] = "".join(capfd.readouterr()).encode()
    for topic in (KYC_APPROVED, WALLETS_REQUESTED, WALLETS_REQUESTED.dlq, WALLETS_PROVISIONED, JOURNAL):
        parts = []
        for record in await read_topic(rig.at.bootstrap, topic, rig.at.prefix):
            value = record.value or b""
            if topic is JOURNAL:
                value = zstandard.ZstdDecompressor().decompress(value, max_output_size=BYTES_MAX)
            parts += [record.key or b"", value, *(text for _, text in record.headers)]
        said[topic.name] = b"\n".join(parts)
    tables = "SELECT tablename::text FROM pg_tables WHERE schemaname = 'stablerail'"
    for (name,) in await rig.at.observer.fetch(tables):
        rows = await rig.at.observer.fetch(f'SELECT t::text FROM "{name}" t')
        said[f"table {name}"] = "\n".join(row[0] for row in rows).encode()
    password = urlsplit(rig.at.dsn).password
    assert password
    secrets = {
        "API key": TEST_API_KEY.encode(),
        "entity secret": TEST_ENTITY_SECRET.encode(),
        "password": password.encode(),
    }
    secrets["entity secret, raw"] = bytes.fromhex(TEST_ENTITY_SECRET)
    secrets |= {f"key of {wallet}": pair.private_key for wallet, pair in state.key_pairs.items()}
    assert len(secrets) == 4 + 4 * 4
    found = [
        (place, name)
        for place, content in said.items()
        for name, secret in secrets.items()
        if any(form in content for form in forms(secret))
    ]
    assert found == []
    assert {"table audit_logs", "table calls", "table leases"} <= said.keys()
    # the search itself finds what is there
    for place in ("logs", "journal", "table audit_logs", "wallets.requested.dlq"):
        assert b"provision_wallets" in said[place], place
