"""Circle's part mounted on the bridge: the vector of our contract notes, which Circle's algorithm must accept."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import httpx
import pytest
from prometheus_client import CollectorRegistry

from connectors.circle.webhooks import CircleWebhooks
from connectors.webhooks.bridge import CIRCLE_PATHS, Limits, Mount, create_bridge
from topics.catalog import WEBHOOKS_DLQ, Topic

PUBLIC_KEY = base64.b64decode(
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEAhfmF/C2RDkoJ4+WmZ5pojpPLBUr321s32bluAKC1O0ZSn3ry5dxLS3aPKhaqHZaVvRfx1hZllLyiXxlMG5XlA=="
)
BODY = (
    b'{"subscriptionId":"3f0c1d52-0a55-4d0b-9b4a-0d1f6c1f1a01","notificationId":"8a1b7c60-52d3-4f0e-9a55-6f1f2c3d4e05",'
    b'"notificationType":"transactions.inbound","notification":{"id":"6b6f2a3e-3a0e-4f9e-8a3e-2f9a7d1c0b11",'
    b'"state":"COMPLETE"},"timestamp":"2026-11-21T02:00:00Z","version":2}'
)
HEADERS = {
    "X-Circle-Key-Id": "11111111-1111-4111-8111-111111111111",
    "X-Circle-Signature": (
        "MEQCIDBXLH/gw+kmhaIaC91TxNwbQOpw2sqSkWPWBKj8Ep+FAiAKK1+7dFcWGsmwhX1ubAiclGMO2U7KYgCzQR4a7TSoPA=="
    ),
}


class Broker:
    connected = True

    def __init__(self) -> None:
        self.messages: list[tuple[Topic, bytes]] = []

    async def publish(self, topic: Topic, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
        self.messages.append((topic, value))


async def key_of(_key_id: str) -> bytes:
    return PUBLIC_KEY


@pytest.mark.parametrize("path", CIRCLE_PATHS)
async def test_the_vector_is_genuine_at_every_alias_and_one_flipped_bit_is_not(path: str) -> None:
    broker = Broker()
    source = CircleWebhooks(key_of, "testnet", {})
    patient = Limits(verify_s=100_000.0)  # a machine that stands still must not make the key late
    app = create_bridge([Mount(source, CIRCLE_PATHS, answers_head=True)], broker, CollectorRegistry(), limits=patient)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bridge") as http:
        forged = await http.post(path, content=BODY.replace(b"COMPLETE", b"COMPLETD"), headers=HEADERS)
        assert (forged.status_code, forged.json()["code"]) == (401, "bad_signature")
        unsigned = await http.post(path, content=BODY)
        assert (unsigned.status_code, unsigned.json()["code"]) == (401, "missing_signature")
        assert (await http.post(path, content=BODY, headers=HEADERS)).status_code == 200
    # Genuine, yet it names no destination: it is kept.
    assert broker.messages == [(WEBHOOKS_DLQ, BODY)]
