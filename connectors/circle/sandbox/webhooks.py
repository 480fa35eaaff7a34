"""Routes under /v2/notifications: subscriptions, and the key that signs their notifications."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox.deliveries import Deliveries
from connectors.circle.sandbox.state import State, Subscription, invalid, not_found, now
from connectors.circle.webhooks import IGNORED_TYPES, INBOUND, OUTBOUND

TEST_TYPE = "webhooks.test"
_TYPES = (IGNORED_TYPES | {INBOUND, OUTBOUND}) - {TEST_TYPE}
SUBSCRIBABLE = {"*"} | _TYPES | {name.partition(".")[0] + ".*" for name in _TYPES}


class _Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Create(_Body):
    endpoint: Annotated[str, Field(max_length=2000)]
    notification_types: list[str] = ["*"]
    name: str = "webhook"


class _Update(_Body):
    name: str
    enabled: bool


def routes(state: State, deliveries: Deliveries) -> APIRouter:
    router = APIRouter(prefix="/v2/notifications")

    def existing(subscription_id: str) -> Subscription:
        if subscription_id not in state.subscriptions:
            raise not_found("subscription")
        return state.subscriptions[subscription_id]

    @router.post("/subscriptions")
    async def create(body: _Create) -> dict[str, Any]:
        types = body.notification_types or ["*"]
        if not set(types) <= SUBSCRIBABLE:
            raise invalid("notificationTypes", "a type that cannot be subscribed")
        # Circle takes HTTPS only; here the endpoint may be a plain one, on this host.
        if urlsplit(body.endpoint).scheme not in ("http", "https"):
            raise invalid("endpoint", "an http or https address")
        if state.config.head_check and not await deliveries.answers_head(body.endpoint):
            raise invalid("endpoint", "the endpoint does not answer HEAD with 2xx")
        subscription = Subscription(
            name=body.name, endpoint=body.endpoint, notification_types=types, restricted="*" not in types
        )
        state.subscriptions[subscription.id] = subscription
        return {"data": subscription.shown()}

    @router.get("/subscriptions")
    async def listed() -> dict[str, Any]:
        return {"data": [subscription.shown() for subscription in state.subscriptions.values()]}

    @router.get("/subscriptions/{subscription_id}")
    async def one(subscription_id: str) -> dict[str, Any]:
        return {"data": existing(subscription_id).shown()}

    @router.patch("/subscriptions/{subscription_id}")
    async def update(subscription_id: str, body: _Update) -> dict[str, Any]:
        changed = existing(subscription_id).model_copy(update={**body.model_dump(), "update_date": now()})
        state.subscriptions[subscription_id] = changed
        return {"data": changed.shown()}

    @router.delete("/subscriptions/{subscription_id}", status_code=204)
    async def delete(subscription_id: str) -> Response:
        del state.subscriptions[existing(subscription_id).id]
        return Response(status_code=204)

    @router.post("/subscriptions/{subscription_id}/test")
    async def test(subscription_id: str) -> dict[str, Any]:
        deliveries.notify(TEST_TYPE, {"hello": "world"}, only=existing(subscription_id))
        return {"data": {}}

    @router.get("/publicKey/{key_id}")
    async def public_key(key_id: str) -> dict[str, Any]:
        key = state.notification_key
        if key_id != key.id:
            raise not_found("public key")
        dated = "2026-01-01T00:00:00Z"
        return {"data": {"id": key.id, "algorithm": "ECDSA_SHA_256", "publicKey": key.public_key, "createDate": dated}}

    return router
