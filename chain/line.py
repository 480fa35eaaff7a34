"""JSON-RPC with one endpoint: a request is one HTTP POST, its answer a result or an RpcError.

Which chain it serves is asked before anything else, and again after a connection failed. While it wants us to wait (429,
Retry-After) nothing is sent to it. The URL may carry a key, so only its scheme and host are ever shown.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
import orjson

from chain.errors import (
    BadLog,
    RpcError,
    RpcGarbled,
    RpcRateLimited,
    RpcRefused,
    RpcTimeout,
    RpcTooLarge,
    RpcUnavailable,
    WrongChainId,
)
from chain.health import Health
from chain.wire import items, mapping, quantity

ANSWER_BYTES_MAX: Final = 64_000_000
"""A getLogs answer of 100,000 transfers; beyond it the range is too wide for one read."""
CONNECTIONS_MAX: Final = 8
REST_S: Final = 1.0
"""After a 429 that does not say how long."""
REST_S_MAX: Final = 60.0
"""However long it says: whether it is still so costs one request a minute."""
RATE_LIMIT_CODES: Final = frozenset({429, -32007, -32029})
"""JSON-RPC errors that are about us, not about the call. Not -32005, which is also a range of blocks that is too wide."""
HEARTBEAT_S: Final = 20.0
HEAD_BYTES_MAX: Final = 1_000_000

T = TypeVar("T")


class Line:
    """A keep-alive client. `close()` it, or use it as an async context manager."""

    def __init__(self, url: str, chain_id: int, timeout_s: float = 10.0) -> None:
        self._url = url
        self.chain_id = chain_id
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._verified = False
        self._last_id = 0
        self.health = Health()
        parts = urlsplit(url)
        self.endpoint = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        """For people and logs: scheme and host."""
        shown = parts.netloc.rpartition("@")[2]
        self._secrets = [text for text in re.split(r"[/?&=:@]", url.replace(shown, "", 1)) if len(text) >= 8]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint}/***, chain_id={self.chain_id})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        session, self._session = self._session, None
        self._verified = False
        if session is not None:
            await session.close()

    async def verify_chain_id(self) -> None:
        """WrongChainId unless the endpoint serves the chain we were told it does. Every call does so first, where it is not known."""
        request = self._request("eth_chainId", [])
        answer = self._checked(mapping, await self._send(request))
        self._check_chain(self._result("eth_chainId", request["id"], answer))

    def _check_chain(self, raw: Any) -> None:
        actual = self._checked(quantity, raw)
        self._verified = actual == self.chain_id
        if not self._verified:
            self.health.failed(WrongChainId.code)
            raise WrongChainId(self.endpoint, self.chain_id, actual)

    def _checked(self, read: Callable[[Any], T], raw: Any) -> T:
        try:
            return read(raw)
        except (ValueError, KeyError, BadLog) as error:
            self.health.failed(RpcGarbled.code)
            # its text quotes what was answered, cut off: a part of a key is no longer found in it
            told = repr(raw) if self._secrets else ""
            secret = any(one in told for one in self._secrets)
            why = type(error).__name__ if secret else f"{type(error).__name__}: {error}"[:200]
            raise RpcGarbled(self.endpoint, why) from None

    async def _call(self, method: str, *params: Any) -> Any:
        request = self._request(method, list(params))
        answer = self._checked(mapping, await self._post(request))
        return self._result(method, request["id"], answer)

    async def _batch(self, calls: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        """Results in the order of the calls. The first refusal raises."""
        results = await self.answers(calls)
        for result in results:
            if isinstance(result, RpcError):
                raise result
        return results

    async def answers(self, calls: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        """One batch: each call's result, or the RpcError that it was answered with, in the order of the calls, whatever the
        order of the answers. Raises RpcError where the batch as such has no answer."""
        requests = [self._request(method, params) for method, params in calls]
        answer = await self._post(requests)
        if isinstance(answer, dict):  # a node that refuses the batch as such answers one error
            raise self._refusal("batch", answer.get("error"))
        answers = {}
        for raw in self._checked(items, answer):
            one = self._checked(mapping, raw)
            number = one.get("id")
            if type(number) is not int or number in answers:
                raise RpcGarbled(self.endpoint, "a batch answer without an id of its own")
            answers[number] = one
        if answers.keys() != {request["id"] for request in requests}:
            raise RpcGarbled(self.endpoint, f"{len(answers)} answers to other ids than the {len(requests)} asked")
        return [self._result_or_error(request, answers[request["id"]]) for request in requests]

    def _result_or_error(self, request: dict[str, Any], answer: dict[str, Any]) -> Any:
        try:
            return self._result(request["method"], request["id"], answer)
        except RpcError as error:
            return error

    def _request(self, method: str, params: list[Any]) -> dict[str, Any]:
        self._last_id += 1
        return {"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params}

    def _result(self, method: str, request_id: int, answer: dict[str, Any]) -> Any:
        if answer.get("error") is not None:
            raise self._refusal(method, answer["error"])
        if answer.get("id") != request_id or "result" not in answer:
            raise RpcGarbled(self.endpoint, f"{method}: neither a result nor an error, or another call's")
        return answer["result"]

    def _refusal(self, method: str, error: Any) -> RpcRefused | RpcGarbled:
        code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
        if type(code) is not int:
            return RpcGarbled(self.endpoint, f"{method}: an error without a code")
        if code in RATE_LIMIT_CODES:
            self.health.rest(REST_S)
        message = str(message)
        for secret in self._secrets:  # some providers quote the key they refuse
            message = message.replace(secret, "***")
        data = error.get("data")
        return RpcRefused(self.endpoint, method, code, message[:200], data if type(data) is str else "")

    async def _post(self, body: Any) -> Any:
        if not self._verified:
            await self.verify_chain_id()
        return await self._send(body)

    async def _send(self, body: Any) -> Any:
        if self.health.rests_s:
            raise RpcRateLimited(self.endpoint, f"for {self.health.rests_s:.1f} s more, as it asked")
        began = time.monotonic()
        try:
            answer = await self._exchange(body)
        except RpcError as error:
            self.health.failed(error.code)
            if isinstance(error, RpcUnavailable | RpcTimeout):
                self._verified = False
            raise
        self.health.answered(time.monotonic() - began)
        return answer

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=self._timeout, connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX)
            )
        return self._session

    async def _exchange(self, body: Any) -> Any:
        try:
            async with self._connected().post(
                self._url,
                data=orjson.dumps(body),
                headers={"content-type": "application/json"},
                allow_redirects=False,
            ) as response:
                status, again = response.status, response.headers.get("Retry-After")
                raw = await self._body(response)
        except TimeoutError:
            raise RpcTimeout(self.endpoint, f"no answer within {self._timeout.total} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # their texts may hold the URL
            raise RpcUnavailable(self.endpoint, type(error).__name__) from None
        if status == 429 or (status == 503 and again is not None):
            self.health.rest(_rest_s(again))
            raise RpcRateLimited(self.endpoint, f"HTTP {status}")
        return self._parsed(status, raw)

    async def watch_heads(self, told: Callable[[], None]) -> None:
        """Calls `told` when the endpoint tells of a new head over WebSocket, at its own URL, until the connection ends. What it
        tells is a hint to look. Raises RpcUnavailable where it offers none."""
        request = self._request("eth_subscribe", ["newHeads"])
        try:
            async with self._connected().ws_connect(
                self._url, heartbeat=HEARTBEAT_S, max_msg_size=HEAD_BYTES_MAX
            ) as socket:
                await socket.send_bytes(orjson.dumps(request), compress=None)
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        self._told(request["id"], message.data)
                        told()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise RpcUnavailable(self.endpoint, type(error).__name__) from None

    def _told(self, request_id: int, text: str) -> None:
        """Raises RpcError when it is a refusal."""
        answer = self._checked(mapping, orjson.loads(text))
        if "id" in answer:
            self._result("eth_subscribe", request_id, answer)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > ANSWER_BYTES_MAX:
                raise RpcTooLarge(self.endpoint, f"the answer is over {ANSWER_BYTES_MAX} bytes")
        return bytes(body)

    def _parsed(self, status: int, raw: bytes) -> Any:
        if status == 413:
            raise RpcTooLarge(self.endpoint, "HTTP 413")
        if status >= 500 or 300 <= status < 400:
            raise RpcUnavailable(self.endpoint, f"HTTP {status}")
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError:
            answer = None
        if status >= 400 and not (isinstance(answer, dict) and answer.get("error") is not None):
            raise RpcUnavailable(self.endpoint, f"HTTP {status}")  # some providers refuse with 400 and a JSON-RPC error
        if answer is None:
            raise RpcGarbled(self.endpoint, "the answer is not JSON")
        return answer


def _rest_s(retry_after: str | None) -> float:
    """Of the header: seconds or a date."""
    try:
        asked = float(retry_after or REST_S)
    except ValueError:
        try:
            asked = (parsedate_to_datetime(str(retry_after)) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):  # of a date whose year or offset no calendar has
            asked = REST_S
    return min(max(asked, REST_S), REST_S_MAX)
