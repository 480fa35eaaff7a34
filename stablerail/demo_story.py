"""The story of `make demo`: its hops, and how each is seen from outside. Nothing here is simulated.

A hop on a topic is done when its record is read back from Kafka, at the record's own time; Circle's are done when its
sandbox lists them; the balance, when the API answers with it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Protocol

import aiohttp
from aiokafka import AIOKafkaConsumer, TopicPartition

from stablerail.dev.anvil import Node
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc
from topics import catalog
from topics.envelope import read
from topics.errors import EventRefused
from topics.events import (
    Chain,
    DepositCredited,
    DepositFinalized,
    DepositNotified,
    Event,
    Evidence,
    HeadSeen,
    KycApproved,
    WalletsProvisioned,
    WalletsRequested,
)
from topics.money import SCALE, format_amount

AMOUNT: Final = 25 * SCALE
STORY_TIMEOUT_S: Final = 180.0
"""About ten times what it takes on two slow cores."""
LOOK_S: Final = 0.05
"""Between two looks at something that is asked over HTTP."""
WATCHED: Final = (*catalog.INPUTS, *(topic.dlq for topic in catalog.INPUTS), catalog.WEBHOOKS_DLQ)


class StoryBroken(Exception):
    """What did not happen, or happened otherwise than it must."""


@dataclass
class Hop:
    """One line of the story. `at`: seconds since the epoch, None = not yet."""

    name: str
    by: str
    detail: str = ""
    at: float | None = None
    seen: asyncio.Event = field(default_factory=asyncio.Event, repr=False)


def _hops() -> dict[str, Hop]:
    return {
        "approval": Hop("POST /webhooks/kyc/sumsub", "kyc/sandbox"),
        "kyc.approved": Hop("kyc.approved", "bridge.py"),
        "wallets.requested": Hop("wallets.requested", "request_wallets.py"),
        "circle": Hop("POST /v1/w3s/developer/wallets", "provision_wallets.py"),
        "wallets.provisioned": Hop("wallets.provisioned", "provision_wallets.py"),
        "mined": Hop("USDC transfer, mined", "dev/usdc.py"),
        "webhook": Hop("POST /webhooks/circle", "circle/sandbox"),
        "by circle": Hop("deposits.notified  by circle", "bridge.py"),
        "by scanner": Hop("deposits.notified  by scanner", "watch_chain.py"),
        "deposits.credited": Hop("deposits.credited", "credit_deposits.py"),
        "balance": Hop("GET /v1/users/{id}/balances", "stablerail/api"),
        "chain.heads": Hop("chain.heads", "watch_chain.py"),
        "deposits.finalized": Hop("deposits.finalized", "finalize_deposits.py"),
        "final": Hop("GET /v1/users/{id}/balances", "stablerail/api"),
    }


class Chapter(Protocol):
    """What follows the story's own hops."""

    hops: dict[str, Hop]

    async def run(self) -> None: ...

    def take(self, event: Event, at: float) -> None: ...


class Story:
    """`run` tells it; `watch_topics` and `watch_circle` run beside it and never return."""

    def __init__(self, stack: Stack, usdc: Usdc, api_key: str, depth_blocks: int) -> None:
        self.user_id = f"customer-{secrets.token_hex(3)}"
        self.hops = _hops()
        self.wallet = ""
        """The customer's address on MATIC, the chain we read."""
        self.tx_hash = ""
        self.block = 0
        self.listeners: list[Callable[[Hop], None]] = []
        self.event_listeners: list[Callable[[str, Event | None, Mapping[str, str]], None]] = []
        self._chapters: list[Chapter] = []
        self._seen: set[tuple[str, str, str]] = set()
        self._stack = stack
        self._usdc = usdc
        self._api_key = api_key
        self._depth_blocks = depth_blocks

    @property
    def anvil(self) -> Node:
        return self._usdc.anvil

    def add(self, chapter: Chapter) -> None:
        self._chapters.append(chapter)
        self.hops |= chapter.hops

    # -- what is done ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """From the approval to the final balance. Raises StoryBroken, naming the hop that did not come."""
        try:
            async with asyncio.timeout(STORY_TIMEOUT_S):
                await self._tell()
        except TimeoutError:
            missing = next(hop for hop in self.hops.values() if hop.at is None)
            raise StoryBroken(
                f"{missing.name} by {missing.by} did not come within {STORY_TIMEOUT_S:g} s of the approval"
            ) from None

    async def _tell(self) -> None:
        self.done("approval", time.time(), f"{self.user_id} is GREEN; signed with HMAC-SHA256")
        await self._stack.approve(self.user_id)
        await self.hops["wallets.provisioned"].seen.wait()
        self.tx_hash = await self._usdc.transfer(self.wallet, AMOUNT)
        receipt = await self.anvil.wait_mined(self.tx_hash, timeout_s=STORY_TIMEOUT_S)
        self.block = int(receipt["blockNumber"], 16)
        self.done("mined", time.time(), f"{format_amount(AMOUNT)} USDC  {short(self.tx_hash)}  block {self.block}")
        await self.hops["deposits.credited"].seen.wait()
        balance = await self.until_balance(lambda found: found["available"] == format_amount(AMOUNT))
        self.done(
            "balance", time.time(), f"available {balance['available']}, of it not final yet {balance['not_final']}"
        )
        await self.hops["deposits.finalized"].seen.wait()
        balance = await self.until_balance(lambda found: found["not_final"] == format_amount(0))
        self.done("final", time.time(), f"available {balance['available']}, all of it final")
        for chapter in self._chapters:
            await chapter.run()
        for hop in self.hops.values():
            await hop.seen.wait()

    async def balance(self) -> dict[str, Any]:
        """The customer's USDC, by our API."""
        url = f"{self._stack.url('api')}/v1/users/{self.user_id}/balances"
        headers = {"Authorization": f"Bearer {self._api_key}"}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as answer:
            if answer.status != 200:
                raise StoryBroken(f"GET {url} answered {answer.status}: {await answer.text()}")
            body = await answer.json()
        usdc: dict[str, Any] = next(each for each in body["balances"] if each["asset"] == "USDC")
        return usdc

    async def until_balance(self, is_right: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            found = await self.balance()
            if is_right(found):
                return found
            await asyncio.sleep(LOOK_S)

    def done(self, key: str, at: float, detail: str) -> None:
        hop = self.hops[key]
        if hop.at is None:
            hop.at, hop.detail = at, detail
            hop.seen.set()
            for listener in self.listeners:
                listener(hop)

    # -- what is seen ------------------------------------------------------------------------------------------------

    async def watch_topics(self, bootstrap: str, prefix: str) -> None:
        """Reads every topic from its start, in no group: no worker notices."""
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False, fetch_max_wait_ms=50)
        await consumer.start()
        try:
            named = {topic.named(prefix): topic for topic in WATCHED}
            consumer.assign([TopicPartition(n, p) for n, topic in named.items() for p in range(topic.partitions)])
            await consumer.seek_to_beginning()
            while True:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    for record in records:
                        self._take(named[record.topic], record)
        finally:
            await consumer.stop()

    def _take(self, topic: catalog.Topic, record: Any) -> None:
        event: Event | None = None
        if topic.models:
            try:
                event = read(topic, record.value, record.headers).event
            except EventRefused:
                event = None
        headers = {name: value.decode(errors="replace") for name, value in record.headers}
        seen = (topic.name, headers.get("ce_source", ""), headers.get("ce_id", ""))
        if event is not None and seen in self._seen:
            return  # at least once: the scanner reads its last blocks again with each pass
        self._seen.add(seen)
        if event is not None and self.hops["approval"].at is not None:
            self._advance(event, record.timestamp / 1000)
        for listener in self.event_listeners:
            listener(topic.name, event, headers)

    def _advance(self, event: Event, at: float) -> None:
        for chapter in self._chapters:
            chapter.take(event, at)
        match event:
            case KycApproved(user_id=self.user_id):
                self.done("kyc.approved", at, f"applicant {event.applicant_id[:8]}…; the signature was verified")
            case WalletsRequested(user_id=self.user_id):
                self.done("wallets.requested", at, ", ".join(event.chains))
            case WalletsProvisioned(user_id=self.user_id):
                self.wallet = next(wallet.address for wallet in event.wallets if wallet.chain is Chain.MATIC)
                shown = "  ".join(f"{wallet.chain} {short(wallet.address, 4)}" for wallet in event.wallets)
                self.done("wallets.provisioned", at, shown)
            case DepositNotified(tx_hash=self.tx_hash, source="circle") if self.tx_hash:
                if event.evidence is Evidence.COMPLETE:
                    self.hops["by circle"].detail += ", later complete"
                else:
                    self.done("by circle", at, f"transfer {event.transfer_id[:8]}…, evidence: {event.evidence}")
            case DepositNotified(tx_hash=self.tx_hash, source="scanner") if self.tx_hash:
                self.done("by scanner", at, f"read by RPC: block {event.block_number}, log {event.log_index}")
            case DepositCredited(tx_hash=self.tx_hash) if self.tx_hash:
                self.done("deposits.credited", at, "debit usdc_balance, credit system_buffer_usdc")
            case HeadSeen(chain=Chain.MATIC) if self.block and self.hops["chain.heads"].at is None:
                on_top = event.number - self.block
                told = f"block {event.number}: {max(on_top, 0)} of the {self._depth_blocks} on top that finality takes"
                self.hops["chain.heads"].detail = told
                if on_top >= self._depth_blocks:
                    self.done("chain.heads", at, told)
            case DepositFinalized(tx_hash=self.tx_hash) if self.tx_hash:
                if event.outcome != "finalized":
                    raise StoryBroken(f"the deposit was {event.outcome}, not finalized")
                self.done("deposits.finalized", at, "debit custody_usdc[MATIC], credit world_usdc")
            case _:
                pass

    async def watch_circle(self) -> None:
        """What Circle's sandbox has made and sent: its own record of it, with its own times."""
        control = f"{self._stack.url('circle')}/_control"
        async with aiohttp.ClientSession() as session:
            while self.hops["circle"].at is None or self.hops["webhook"].at is None:
                made, sent = await _get(session, f"{control}/created"), await _get(session, f"{control}/deliveries")
                wallets = [wallet for wallet in made["wallets"] if wallet.get("refId") == self.user_id]
                if wallets:
                    chains = ", ".join(wallet["blockchain"] for wallet in wallets)
                    self.done("circle", max(map(_created_at, wallets)), chains)
                ours = {t["id"]: t for t in made["transactions"] if self.tx_hash and t["txHash"] == self.tx_hash}
                for delivery in sent["deliveries"]:
                    transfer = ours.get(delivery["resourceId"])
                    if transfer is not None and delivery["delivered"]:
                        told = (
                            f"transactions.inbound {delivery['state']}; signed with ECDSA; {delivery['attempts'][-1]}"
                        )
                        self.done("webhook", _created_at(transfer), told)
                await asyncio.sleep(LOOK_S)
        await asyncio.Event().wait()


def describe(topic: str, event: Event | None, headers: Mapping[str, str]) -> str | None:
    """A line for an event that comes while the demo stays up; None for what would only make noise."""
    if event is None:
        why = headers.get("dlq_code")
        return f"refused: {why}, {headers.get('dlq_reason', '')}" if why else "refused"
    if isinstance(event, HeadSeen):
        return None
    fields = json.loads(event.model_dump_json(exclude={"version", "vendor_event_id", "approved_at", "transfer_id"}))
    told = [short(str(value)) for name, value in fields.items() if isinstance(value, str) and name != "block_hash"]
    if isinstance(event, WalletsRequested):
        told.append(", ".join(event.chains))
    if isinstance(event, WalletsProvisioned):
        told.extend(f"{wallet.chain} {short(wallet.address)}" for wallet in event.wallets)
    return "  ".join(told)


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url) as answer:
        body: dict[str, Any] = await answer.json()
        return body


def _created_at(record: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(record["createDate"]).timestamp()


def short(text: str, kept: int = 10) -> str:
    """Addresses, hashes and our ids; a customer's name stays whole."""
    return text if len(text) <= 24 else f"{text[:kept]}…{text[-4:]}"
