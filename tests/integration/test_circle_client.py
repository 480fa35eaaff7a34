"""Our client against the sandbox over HTTP: what each answer of a partner means to us, and what is done once."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from eth_utils.address import is_address
from pydantic import SecretStr
from solders.pubkey import Pubkey

from connectors.circle.client import PAGE_SIZE, CircleClient, CircleWallet
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.control import InjectedTransfer, inject_transfer
from connectors.circle.sandbox.gate import Fault, Gate
from connectors.circle.sandbox.state import Transaction
from connectors.circle.sandbox.tokens import USDC_TOKENS, usdc_token_id
from connectors.circle.transactions import notified
from connectors.errors import CREDENTIALS, ConnectorError, RateLimited, Refused, Unavailable, Unknown
from topics.events import DepositNotified, Evidence

ALL_CHAINS = ["ETH-SEPOLIA", "SOL-DEVNET", "APTOS-TESTNET", "MATIC-AMOY"]
WALLETS = "/v1/w3s/developer/wallets"


@pytest.fixture
async def circle() -> AsyncIterator[CircleSandbox]:
    async with CircleSandbox(SandboxConfig(rsa_bits=2048, rate_limits=False)) as sandbox:
        yield sandbox


@pytest.fixture
async def client(circle: CircleSandbox) -> AsyncIterator[CircleClient]:
    async with client_of(circle.base_url) as client:
        yield client


def client_of(
    base_url: str, api_key: str = TEST_API_KEY, entity_secret: str = TEST_ENTITY_SECRET, timeout_s: float = 10
) -> CircleClient:
    return CircleClient(base_url, SecretStr(api_key), SecretStr(entity_secret), timeout_s=timeout_s)


@asynccontextmanager
async def served(reply: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The address of a server that answers everything with `reply`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", reply)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


def key() -> str:
    return str(uuid4())


def inject(circle: CircleSandbox, transfer: InjectedTransfer) -> Transaction:
    return inject_transfer(circle.sandbox.state, circle.sandbox.deliveries, transfer)


def created(circle: CircleSandbox) -> list[tuple[str | None, str]]:
    return [(wallet.ref_id, wallet.blockchain) for wallet in circle.sandbox.state.wallets.values()]


async def test_a_customer_gets_a_valid_address_on_every_chain(client: CircleClient) -> None:
    wallet_set = await client.create_wallet_set(key(), "customers")
    wallets = await client.create_wallets(key(), wallet_set, ALL_CHAINS, [("alice", "user_1"), ("bob", "user_2")])
    assert sorted((w.ref_id, w.blockchain) for w in wallets) == sorted(
        (user, chain) for user in ("user_1", "user_2") for chain in ALL_CHAINS
    )
    found = {(w.ref_id, w.blockchain): w.address for w in wallets}
    for user in ("user_1", "user_2"):
        assert is_address(found[user, "ETH-SEPOLIA"])
        assert found[user, "ETH-SEPOLIA"] == found[user, "MATIC-AMOY"] == found[user, "ETH-SEPOLIA"].lower()
        assert Pubkey.from_string(found[user, "SOL-DEVNET"]).is_on_curve()
        assert len(bytes.fromhex(found[user, "APTOS-TESTNET"][2:])) == 32
    assert len({w.id for w in wallets}) == 8
    assert len(set(found.values())) == 6
    assert sorted(await client.list_wallets("user_2"), key=lambda w: w.id) == sorted(
        (w for w in wallets if w.ref_id == "user_2"), key=lambda w: w.id
    )
    assert await client.list_wallets("nobody") == []


async def test_a_repeat_with_the_same_key_gives_the_first_result_and_creates_nothing(
    circle: CircleSandbox, client: CircleClient
) -> None:
    set_key, wallets_key = key(), key()
    wallet_set = await client.create_wallet_set(set_key, "customers")
    first = await client.create_wallets(wallets_key, wallet_set, ALL_CHAINS, [("alice", "user_1")])
    assert await client.create_wallet_set(set_key, "customers") == wallet_set
    assert await client.create_wallets(wallets_key, wallet_set, ALL_CHAINS, [("alice", "user_1")]) == first
    assert len(created(circle)) == 4
    with pytest.raises(Refused) as refused:
        await client.create_wallets(wallets_key, wallet_set, ALL_CHAINS, [("mallory", "user_2")])
    assert refused.value.status == 409
    assert len(created(circle)) == 4


@pytest.mark.parametrize("kind", ["lost_reply", "hang"])
async def test_a_lost_reply_is_unknown_and_the_same_key_gives_what_was_done(circle: CircleSandbox, kind: Any) -> None:
    async with client_of(circle.base_url, timeout_s=100) as client:
        wallet_set = await client.create_wallet_set(key(), "customers")
        circle.sandbox.gate.faults.append(Fault(WALLETS, kind, acts=True))
        wallets_key = key()
        session = client._session
        assert session is not None
        patient = session._timeout
        if kind == "hang":  # connected, and the key is known: all that takes time is the answer, after the deed
            session._timeout = aiohttp.ClientTimeout(total=3)
        with pytest.raises(Unknown):
            await client.create_wallets(wallets_key, wallet_set, ["MATIC-AMOY"], [("alice", "user_1")])
        session._timeout = patient
        assert created(circle) == [("user_1", "MATIC-AMOY")]
        wallets = await client.create_wallets(wallets_key, wallet_set, ["MATIC-AMOY"], [("alice", "user_1")])
        assert [w.id for w in wallets] == list(circle.sandbox.state.wallets)


async def test_a_failure_of_the_partner_is_unavailable_whether_it_acted_or_not(
    circle: CircleSandbox, client: CircleClient
) -> None:
    wallet_set = await client.create_wallet_set(key(), "customers")
    for acts in (False, True):
        circle.sandbox.gate.faults.append(Fault(WALLETS, "status", status=503, acts=acts))
        with pytest.raises(Unavailable) as error:
            await client.create_wallets(key(), wallet_set, ["MATIC-AMOY"], [("alice", f"acts {acts}")])
        assert error.value.sent
    assert created(circle) == [("acts True", "MATIC-AMOY")]


def within_one_second(gate: Gate) -> Callable[[str, float], bool]:
    """However long the calls take on a busy machine, they come in one second."""
    admit = gate.admit
    return lambda endpoint, _now: admit(endpoint, 0.0)


async def test_more_calls_than_circle_allows_are_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    async with CircleSandbox(SandboxConfig(rsa_bits=2048)) as limited, client_of(limited.base_url) as client:
        monkeypatch.setattr(limited.sandbox.gate, "admit", within_one_second(limited.sandbox.gate))
        results = await asyncio.gather(
            *(client.create_wallet_set(key(), "customers") for _ in range(12)), return_exceptions=True
        )
        assert {type(result) for result in results} == {str, RateLimited}
        assert len(limited.sandbox.state.wallet_sets) == sum(isinstance(result, str) for result in results)


async def test_nothing_is_sent_when_no_connection_can_be_made() -> None:
    async with CircleSandbox(SandboxConfig(rsa_bits=2048)) as gone:
        base_url = gone.base_url
    async with client_of(base_url) as client:
        with pytest.raises(Unavailable) as error:
            await client.create_wallet_set(key(), "customers")
        assert not error.value.sent


async def test_a_lost_look_up_of_the_entity_key_means_that_nothing_was_sent(circle: CircleSandbox) -> None:
    circle.sandbox.gate.faults.append(Fault("/v1/w3s/config/entity/publicKey", "lost_reply"))
    async with client_of(circle.base_url) as client:
        with pytest.raises(Unavailable) as error:
            await client.create_wallet_set(key(), "customers")
        assert not error.value.sent
        assert await client.create_wallet_set(key(), "customers")


async def test_a_refused_look_up_of_the_entity_key_is_no_refusal_of_what_it_was_for(circle: CircleSandbox) -> None:
    path = "/v1/w3s/config/entity/publicKey"
    circle.sandbox.gate.faults += [Fault(path, "status", status=404), Fault(path, "status", status=401)]
    async with client_of(circle.base_url) as client:
        with pytest.raises(Unavailable) as error:
            await client.create_wallet_set(key(), "customers")
        assert not error.value.sent
        with pytest.raises(Refused) as refused:
            await client.create_wallet_set(key(), "customers")
        assert refused.value.ours == CREDENTIALS


async def test_a_refused_entity_secret_is_about_our_credentials_and_the_entity_key_is_asked_for_anew(
    circle: CircleSandbox, client: CircleClient
) -> None:
    await client.create_wallet_set(key(), "customers")
    ours, state = circle.sandbox.state.entity_secret, circle.sandbox.state
    for registered, code in ((bytes(32), "156013"), (None, "156016")):
        state.entity_secret = registered
        with pytest.raises(Refused) as refused:
            await client.create_wallet_set(key(), "customers")
        assert (refused.value.status, refused.value.partner_code, refused.value.ours) == (400, code, CREDENTIALS)
    state.entity_secret = ours
    await client.create_wallet_set(key(), "customers")
    assert circle.sandbox.gate.calls["GET /v1/w3s/config/entity/publicKey"] == 3


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("not-a-uuid", "00000000-0000-4000-8000-000000000000", ["MATIC-AMOY"], [("a", "b")]), 400, "parameter"),
        ((None, "00000000-0000-4000-8000-000000000000", ["MATIC-AMOY"], [("a", "b")]), 404, "wallet set"),
        ((None, None, ["DOGE"], [("a", "b")]), 400, "parameter"),
        ((None, None, ["MATIC-AMOY"], []), 400, "parameter"),
        ((None, None, ["MATIC-AMOY"], [("a", "b")] * 201), 400, "parameter"),
    ],
)
async def test_what_circle_does_not_take_is_refused_for_good(
    client: CircleClient, circle: CircleSandbox, arguments: tuple[Any, ...], status: int, text: str
) -> None:
    idempotency_key, wallet_set, blockchains, metadata = arguments
    wallet_set = wallet_set or await client.create_wallet_set(key(), "customers")
    with pytest.raises(Refused, match=text) as refused:
        await client.create_wallets(idempotency_key or key(), wallet_set, blockchains, metadata)
    assert refused.value.status == status
    assert created(circle) == []


async def test_two_hundred_wallets_are_made_in_one_call_and_listed_over_pages(client: CircleClient) -> None:
    wallet_set = await client.create_wallet_set(key(), "customers")
    wallets = await client.create_wallets(key(), wallet_set, ["MATIC-AMOY"], [("many", "user_1")] * 200)
    listed = await client.list_wallets("user_1")
    assert [w.id for w in listed] == [w.id for w in reversed(wallets)]


async def test_secrets_are_in_no_error_no_text_and_no_log(
    circle: CircleSandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong_key, wrong_secret = "TEST_API_KEY:wrong:wrongwrong", "ab" * 32
    texts = [repr(circle.config), repr(circle.sandbox.state)]
    for api_key, secret in ((wrong_key, TEST_ENTITY_SECRET), (TEST_API_KEY, wrong_secret)):
        async with client_of(circle.base_url, api_key, secret) as client:
            with pytest.raises(Refused) as refused:
                await client.create_wallet_set(key(), "customers")
            assert refused.value.status in (400, 401)
            texts += [repr(client), repr(vars(client)), repr(refused.value), str(refused.value)]
    with pytest.raises(ValueError, match="64 hexadecimal") as malformed:
        client_of(circle.base_url, entity_secret="not-hex-but-secret")
    text = " ".join([*texts, str(malformed.value), caplog.text])
    for secret in (wrong_key, "wrongwrong", wrong_secret, TEST_API_KEY, TEST_ENTITY_SECRET, "not-hex-but-secret"):
        assert secret not in text


async def test_a_ciphertext_is_good_for_one_request(circle: CircleSandbox, client: CircleClient) -> None:
    body = {"idempotencyKey": key(), "name": "customers", "entitySecretCiphertext": await client._ciphertext()}
    headers = {"Authorization": f"Bearer {TEST_API_KEY}"}
    url = f"{circle.base_url}/v1/w3s/developer/walletSets"
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(url, json=body) as reply:
            assert reply.status == 201
            first = await reply.json()
        async with session.post(url, json=body) as reply:
            assert reply.status == 400
            error = await reply.json()
            assert error["code"] == 156004
        async with session.post(url, json=body | {"entitySecretCiphertext": await client._ciphertext()}) as reply:
            assert (reply.status, await reply.json()) == (200, first)


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (201, b'{"data": {"walletSet": {"id": "7", "state": "NEW-STATE", "extra": {}}}}', None),
        (201, b"<html>", Unknown),
        (201, b'{"data": []}', Unknown),
        (201, b'{"data": {"walletSet": null}}', Unknown),
        (201, b'{"data": {"walletSet": "7"}}', Unknown),
        (201, b'{"data": {"walletSet": {"id": "a\\u0000b"}}}', Unknown),
        (302, b"", Unknown),
        (302, b'{"code": 2, "message": "over there"}', Unknown),
        (400, b'{"code": -1, "message": "Something went wrong"}', Unavailable),
        (400, b'{"code": 2, "message": "API parameter invalid"}', Refused),
        (400, b'{"code": 156004, "message": "Reusing an entity secret ciphertext is not allowed."}', Unknown),
        (400, b"<html>", Unknown),
        (401, b"", Refused),
        (403, b"<html>", Refused),
        (404, b'{"message": "no Route matched with those values"}', Unknown),
        (404, b'{"code": 404, "mess', Unknown),
        (404, b'{"code": "NotFound", "message": "a gateway knows no such path"}', Unknown),
        (400, b'{"code": null, "message": "no"}', Unknown),
        (400, b'{"code": true}', Unknown),
        (413, b"<html>", Unknown),
        (408, b"", Unavailable),
        (502, b"<html>", Unavailable),
    ],
)
async def test_any_answer_is_a_result_or_one_of_our_errors(
    status: int, content: bytes, expected: type[ConnectorError] | None
) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(status=status, body=content, headers={"Location": "/elsewhere"})

    async with CircleSandbox(SandboxConfig(rsa_bits=2048)) as real, client_of(real.base_url) as client:
        await client._ciphertext()  # the entity key is known from here on
        async with served(reply) as base_url:
            client._base_url = base_url
            if expected is None:
                assert await client.create_wallet_set(key(), "customers") == "7"
                return
            with pytest.raises(expected):
                await client.create_wallet_set(key(), "customers")


@pytest.mark.parametrize("odd", ["", "a\0b", "a\nb", " a", "\u00fc", "a" * 201, None, 7])
async def test_an_id_that_our_books_cannot_hold_is_no_readable_reply(circle: CircleSandbox, odd: Any) -> None:
    """What was made is made: the same key must ask again, so this is no refusal, and no success either."""
    wallet = {"id": odd, "address": "0x1", "blockchain": "MATIC-AMOY", "refId": "user_1"}

    async def reply(request: web.Request) -> web.Response:
        return web.json_response({"data": {"id": odd, "state": "INITIATED", "wallets": [wallet], "wallet": wallet}})

    async with client_of(circle.base_url) as client, served(reply) as base_url:
        await client._ciphertext()  # the entity key is known from here on
        client._base_url = base_url
        for asked in (
            client.create_wallets(key(), "set", ["MATIC-AMOY"], [("alice", "user_1")]),
            client.list_wallets("user_1"),
            client.wallet("w1"),
            client.create_transfer(
                key(),
                wallet_id="w1",
                token_id="t1",
                destination_address="0x1",
                amount="1",
                fee_level="LOW",
                ref_id="r1",
            ),
        ):
            with pytest.raises(Unknown):
                await asked


@pytest.mark.parametrize(
    ("written", "read"), [("A\nB\0", "AB"), ("k\u00f6" * 9, "k" * 9), ("n" * 999, "n" * 300), (None, "None")]
)
async def test_a_refusal_is_read_without_what_no_event_can_hold(written: Any, read: str) -> None:
    async def reply(request: web.Request) -> web.Response:
        return web.json_response({"code": 175005, "message": written}, status=400)

    async with served(reply) as base_url, client_of(base_url) as client:
        with pytest.raises(Refused) as refused:
            await client.list_wallets("user_1")
        assert (refused.value.partner_code, refused.value.message) == ("175005", read)


def pem(der: str) -> str:
    return f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(bytes.fromhex(der)).decode()}\n-----END PUBLIC KEY-----\n"


@pytest.mark.parametrize(
    "odd",
    [
        None,
        "no key",
        pem("300c300506032a0304"),  # cut off
        pem("300c300506032a03040303000102"),  # of an algorithm that nobody knows
        pem("3015300e06072a8648ce3d020106032a03040303000102"),  # on a curve that nobody knows
        pem("305c300d06092a864886f70d0101010500034b00304802410080" + "00" * 62 + "010203010001"),  # RSA of 512 bits
    ],
)
async def test_with_a_key_that_nothing_can_be_encrypted_for_nothing_is_sent_and_the_worker_lives(odd: Any) -> None:
    sent = []

    async def reply(request: web.Request) -> web.Response:
        sent.append(request.method)
        return web.json_response({"data": {"publicKey": odd}})

    async with served(reply) as base_url, client_of(base_url) as client:
        with pytest.raises(Unavailable) as unavailable:
            await client.create_wallet_set(key(), "customers")
        assert (unavailable.value.sent, sent) == (False, ["GET"])


@pytest.mark.parametrize(
    ("said", "at_least", "at_most"),
    [
        ("7", 7, 7),
        ("0", 1, 1),  # no leave to ask without end
        ("Thu, 01 Jan 2998 00:00:00 GMT", 10**10, 10**11),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 1, 1),
        ("9" * 300, 10**8, 10**10),
    ],
)
async def test_a_rate_limit_with_a_time_says_when(said: str, at_least: float, at_most: float) -> None:
    async with served(limited(said)) as base_url, client_of(base_url) as client:
        with pytest.raises(RateLimited) as error:
            await client.list_wallets("user_1")
        assert error.value.retry_after_s is not None
        assert at_least <= error.value.retry_after_s <= at_most


@pytest.mark.parametrize(
    "said", ["soon", "-1", "1.5", "\u00b2", "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 99999 08:49:37 GMT"]
)
async def test_a_rate_limit_with_a_time_that_is_none_says_nothing(said: str) -> None:
    async with served(limited(said)) as base_url, client_of(base_url) as client:
        with pytest.raises(RateLimited) as error:
            await client.list_wallets("user_1")
        assert error.value.retry_after_s is None


def limited(retry_after: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def reply(request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": retry_after})

    return reply


def test_a_wallet_of_an_unknown_kind_can_still_be_read() -> None:
    wallet = CircleWallet.model_validate(
        {"id": "1", "address": "0x1", "blockchain": "SUI", "state": "THAWED", "accountType": "NEW", "refId": None}
    )
    assert (wallet.blockchain, wallet.state, wallet.ref_id) == ("SUI", "THAWED", None)


async def test_every_inbound_transaction_is_listed_once_oldest_first_and_found_by_hash_and_address(
    circle: CircleSandbox, client: CircleClient
) -> None:
    wallet_set = await client.create_wallet_set(key(), "customers")
    sol, other = await client.create_wallets(key(), wallet_set, ["SOL-DEVNET"], [("a", "user_1"), ("b", "user_2")])
    sent = [inject(circle, InjectedTransfer(walletId=sol.id, amount=str(n + 1))) for n in range(PAGE_SIZE + 3)]
    theirs = inject(circle, InjectedTransfer(walletId=other.id, amount="1", txHash=sent[0].tx_hash))

    assert [t["id"] for t in await client.list_transactions()] == [*(t.id for t in sent), theirs.id]
    assert [t["id"] for t in await client.list_transactions(tx_hash=sent[0].tx_hash)] == [sent[0].id, theirs.id]
    (one,) = await client.list_transactions(
        blockchain="SOL-DEVNET", tx_hash=sent[0].tx_hash, destination_address=sol.address
    )
    assert notified(one, "testnet", USDC_TOKENS) == DepositNotified(
        source="circle", transfer_id=sent[0].id, chain="SOL", tx_hash=sent[0].tx_hash, to=sol.address, asset="USDC",
        amount=1_000_000, evidence=Evidence.COMPLETE, block_number=sent[0].block_height,
        sender=sent[0].source_address,
    )  # fmt: skip
    assert await client.list_transactions(tx_hash="none") == []

    first = await client.inbound_page(since=sent[2].create_date)
    assert first[0]["id"] == sent[2].id
    rest = await client.inbound_page(since=sent[2].create_date, after=first[-1]["id"])
    assert [t["id"] for t in (*first, *rest)] == [*(t.id for t in sent[2:]), theirs.id]
    assert await client.transaction(theirs.id) == theirs.shown()
    with pytest.raises(Refused):
        await client.transaction("no/such?one")


async def test_wallets_that_hold_a_token_are_listed_in_pages_with_what_they_hold(
    circle: CircleSandbox, client: CircleClient
) -> None:
    sol, usdc = "SOL-DEVNET", usdc_token_id("SOL-DEVNET")
    wallet_set = await client.create_wallet_set(key(), "customers")
    names = [(f"u{n}", f"u{n}") for n in range(PAGE_SIZE + 3)]
    wallets = await client.create_wallets(key(), wallet_set, [sol, "APTOS-TESTNET"], names)
    paid = [wallet for wallet in wallets if wallet.blockchain == sol][:-1]
    for n, wallet in enumerate(paid, 1):
        inject(circle, InjectedTransfer(walletId=wallet.id, amount=f"{n}.000001"))
    token = await client.token_address(usdc)
    first, after = await client.holdings_page(sol, usdc, token)
    second, end = await client.holdings_page(sol, usdc, token, after=after)
    assert (len(first), len(second), end) == (PAGE_SIZE, 2, None)
    held = {(one.id, one.address, one.wallet_set_id): one.amount for one in (*first, *second)}
    assert held == {(one.id, one.address, wallet_set): f"{n}.000001" for n, one in enumerate(paid, 1)}
    assert await client.holding(paid[0].id, usdc, token) == "1.000001"
    assert await client.holding(wallets[-1].id, usdc, token) == "0"
    with pytest.raises(Refused):
        await client.token_address(key())


async def test_balances_that_cannot_be_read_are_unknown() -> None:
    for data in (
        {},
        {"wallets": 1, "tokenBalances": 1, "token": 1},
        {"wallets": [{}], "tokenBalances": [{}], "token": {}},
    ):

        async def answer(_: web.Request, data: Any = data) -> web.Response:
            return web.json_response({"data": data})

        async with served(answer) as url, client_of(url) as client:
            for ask in (
                client.holdings_page("SOL", "t", "a"), client.holding("w", "t", "a"), client.token_address("t"),
            ):  # fmt: skip
                with pytest.raises(Unknown):
                    await ask
