"""Circle Mint: the list of transfers, and the notifications of version 1: a subscription is two SNS topics, each to be confirmed, and
each tells everything. What is told of a transfer is listed too, told to anybody or not.

The certificate is the sandbox's own and is served under /_sns, beside the confirmation: a bridge believes it only where it is
told to trust this host in Amazon's place. What is answered 5xx, 429 or not at all is sent again; any other answer is the last one.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import uuid4

import aiohttp
import orjson
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox.state import Paging, not_found
from connectors.circle.sns import Envelope
from connectors.circle.transactions import created_at

REGIONS: Final = ("us-east-1", "us-west-2")
TOPIC_ARNS: Final = tuple(
    f"arn:aws:sns:{region}:908968368384:sandbox_platform-notifications-topic" for region in REGIONS
)
CERTIFICATE: Final = "/_sns/SimpleNotificationService-sandbox.pem"
ANSWER_S_MAX: Final = 15.0

Version = Literal["1", "2"]


@dataclass
class Topic:
    """One region's half of a subscription."""

    arn: str
    endpoint: str
    token: str = field(default_factory=lambda: uuid4().hex)
    status: str = "pending"


class Listed(NamedTuple):
    """A transfer in the list."""

    id: str
    create_date: datetime
    shown: dict[str, Any]


class MintSandbox:
    """Its transfers, its subscriptions and its signing key."""

    def __init__(self, retry_delays_s: Sequence[float]) -> None:
        self._retry_delays_s = retry_delays_s
        self.subscriptions: dict[str, list[Topic]] = {}
        self.transfers: dict[str, dict[str, Any]] = {}
        self.base_url = ""
        """Where certificate and confirmations are, as the first subscriber reached us."""
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[int | str]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    @cached_property
    def key(self) -> rsa.RSAPrivateKey:
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)

    @cached_property
    def certificate(self) -> bytes:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
        now = datetime.now(UTC)
        built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self.key.public_key())
        built = built.serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=365))
        return built.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def message(self, kind: str, arn: str, text: str, version: Version = "1", **fields: str) -> bytes:
        """A signed SNS message."""
        body = {
            "Type": kind,
            "MessageId": str(uuid4()),
            "TopicArn": arn,
            "Message": text,
            "Timestamp": _z(datetime.now(UTC)),
            "SignatureVersion": version,
            "SigningCertURL": self.base_url + CERTIFICATE,
            **fields,
        }
        signed = Envelope.model_validate({**body, "Signature": ""}).signed()
        algorithm = hashes.SHA1() if version == "1" else hashes.SHA256()  # noqa: S303  (Amazon's version 1)
        body["Signature"] = base64.b64encode(self.key.sign(signed, padding.PKCS1v15(), algorithm)).decode()
        return orjson.dumps(body)

    def put(self, transfer: dict[str, Any]) -> dict[str, Any]:
        """A transfer, or what it has become, as it is shown from now on; it may be as odd as one likes."""
        key = str(transfer.get("id") or uuid4())
        made = {"createDate": _z(datetime.now(UTC)), **self.transfers.get(key, {})}
        self.transfers[key] = {**made, **transfer}
        return self.transfers[key]

    def listed(self) -> list[Listed]:
        """In order of creation."""
        now = datetime.now(UTC)
        found = [Listed(key, created_at(shown) or now, shown) for key, shown in self.transfers.items()]
        return sorted(found, key=lambda each: each.create_date)

    def subscribe(self, endpoint: str) -> str:
        """The id; asks the endpoint to confirm, for each region."""
        subscription_id = str(uuid4())
        topics = [Topic(arn, endpoint) for arn in TOPIC_ARNS]
        self.subscriptions[subscription_id] = topics
        for topic in topics:
            url = f"{self.base_url}/_sns/?Action=ConfirmSubscription&TopicArn={topic.arn}&Token={topic.token}"
            text = "You have chosen to subscribe to the topic"
            body = self.message("SubscriptionConfirmation", topic.arn, text, SubscribeURL=url, Token=topic.token)
            self._spawn(endpoint, body, "SubscriptionConfirmation")
        return subscription_id

    def shown(self, subscription_id: str) -> dict[str, Any]:
        topics = self.subscriptions[subscription_id]
        details = [{"url": topic.arn, "arn": topic.arn, "status": topic.status} for topic in topics]
        return {"id": subscription_id, "endpoint": topics[0].endpoint, "subscriptionDetails": details}

    def confirm(self, token: str) -> bool:
        for topics in self.subscriptions.values():
            for topic in topics:
                if topic.token == token:
                    topic.status = "confirmed"
                    return True
        return False

    async def notify(self, notification: dict[str, Any], version: Version, copies: int) -> list[int | str]:
        """Both regions of every confirmed subscription tell it, `copies` times; what each was answered at last."""
        text = orjson.dumps(notification).decode()
        told = [
            self._spawn(topic.endpoint, self.message("Notification", topic.arn, text, version), "Notification")
            for topics in self.subscriptions.values()
            for topic in topics
            if topic.status == "confirmed"
            for _ in range(copies)
        ]
        return list(await asyncio.gather(*told))

    def _spawn(self, endpoint: str, body: bytes, kind: str) -> asyncio.Task[int | str]:
        task = asyncio.create_task(self._post(endpoint, body, kind))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _post(self, endpoint: str, body: bytes, kind: str) -> int | str:
        answer = await self._post_once(endpoint, body, kind)
        for delay_s in self._retry_delays_s:
            if isinstance(answer, int) and answer < 500 and answer != 429:
                break
            await asyncio.sleep(delay_s)
            answer = await self._post_once(endpoint, body, kind)
        return answer

    async def _post_once(self, endpoint: str, body: bytes, kind: str) -> int | str:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S_MAX))
        headers = {"x-amz-sns-message-type": kind, "Content-Type": "text/plain; charset=UTF-8"}
        try:
            async with self._session.post(endpoint, data=body, headers=headers) as reply:
                return reply.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return type(error).__name__


def _z(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Subscribe(BaseModel):
    endpoint: str


class _Notify(BaseModel):
    """`{"notificationType": "transfers", "resource": {"transfer": {…}}}`"""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    notification_type: str
    resource: dict[str, Any] = {}
    signature_version: Version = "1"
    copies: Annotated[int, Field(ge=0, le=10)] = 1
    """0: nobody is told."""


def api(mint: MintSandbox) -> APIRouter:
    """Circle's own paths."""
    router = APIRouter()

    @router.get("/v1/businessAccount/transfers")
    async def transfers(paging: Annotated[Paging, Query()]) -> dict[str, Any]:
        paging.order = "DESC"  # Mint has no parameter for it
        return {"data": [each.shown for each in paging.page(mint.listed())]}

    @router.get("/v1/businessAccount/transfers/{transfer_id}")
    async def transfer(transfer_id: str) -> dict[str, Any]:
        if transfer_id not in mint.transfers:
            raise not_found("transfer")
        return {"data": mint.transfers[transfer_id]}

    @router.post("/v1/notifications/subscriptions", status_code=200)
    async def create(request: Request, body: _Subscribe) -> dict[str, Any]:
        mint.base_url = mint.base_url or str(request.base_url).rstrip("/")
        return {"data": mint.shown(mint.subscribe(body.endpoint))}

    @router.get("/v1/notifications/subscriptions")
    async def listed() -> dict[str, Any]:
        return {"data": [mint.shown(each) for each in mint.subscriptions]}

    return router


def amazon(mint: MintSandbox) -> APIRouter:
    """What Amazon SNS serves."""
    router = APIRouter()

    @router.get(CERTIFICATE)
    async def certificate() -> Response:
        return Response(mint.certificate, media_type="application/x-pem-file")

    @router.get("/_sns/")
    async def confirm(request: Request) -> Response:
        if not mint.confirm(request.query_params.get("Token", "")):
            raise not_found("subscription")
        return Response("<ConfirmSubscriptionResponse/>", media_type="text/xml")

    return router


def control(mint: MintSandbox) -> APIRouter:
    router = APIRouter(prefix="/_control/mint")

    @router.post("/notify")
    async def notify(body: _Notify) -> dict[str, Any]:
        resource = dict(body.resource)
        if isinstance(transfer := resource.get("transfer"), dict):
            resource["transfer"] = mint.put(transfer)
        notification = {"clientId": "sandbox", "notificationType": body.notification_type, "version": 1, **resource}
        return {"statuses": await mint.notify(notification, body.signature_version, body.copies)}

    return router
