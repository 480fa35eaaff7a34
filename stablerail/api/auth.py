"""Which key may do what: 401 without a valid key, 403 with one that lacks the scope."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials

from stablerail.api.reads import ACQUIRE_TIMEOUT_S
from stablerail.keys import Key, Scope, authenticate
from stablerail.problems import Problem

_REALM: Final = 'Bearer realm="stablerail"'

# Declares the scheme to OpenAPI; the header itself is read by `authenticate`, which also knows our keys' form.
_bearer = HTTPBearer(
    scheme_name="APIKey", description="`sr_<id>_<secret>`, from `stablerail keys create`", auto_error=False
)


@cache
def needs(scope: Scope) -> Callable[..., Awaitable[Key]]:
    """A dependency that gives the caller's key when it has the scope, the same for each scope, so that a request is looked
    up once. Raises the problem otherwise."""

    async def key_of(
        request: Request, _declared: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Key:
        header = request.headers.get("authorization")
        async with request.app.state.pool.acquire(timeout=ACQUIRE_TIMEOUT_S) as connection:
            key = await authenticate(connection, header)
        if key is None:
            challenge = _REALM if header is None else f'{_REALM}, error="invalid_token"'
            raise Problem(
                401,
                "missing_key" if header is None else "invalid_key",
                "Send an API key: Authorization: Bearer sr_<id>_<secret>."
                if header is None
                else "This API key is malformed, unknown, wrong or revoked.",
                headers={"WWW-Authenticate": challenge},
            )
        if not key.allows(scope):
            raise Problem(
                403,
                "insufficient_scope",
                f"This API key does not have the scope {scope.value}.",
                headers={"WWW-Authenticate": f'{_REALM}, error="insufficient_scope", scope="{scope.value}"'},
            )
        return key

    return key_of
