"""Keys in AWS on moto's server: what they sign is mined by a node, and on AWS's bad days nothing is lost or paid twice."""

from __future__ import annotations

import logging
import pickle
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agents.withdrawals import desks
from chain import aws as of_aws
from chain.aws import ORDER, READ_S
from chain.errors import BadKeystore, KeystoreError, KeyUnavailable, SignerError, WrongPassword, WrongSigner
from chain.keys import load_key
from chain.signer import KeySigner, Signer
from ledger.rows import Connection
from stablerail.config import ConfigError, load_settings
from stablerail.dev.anvil import Anvil
from stablerail.dev.keystore import write_keystore
from stablerail.dev.usdc import Usdc
from stablerail.hot_wallets import hot_wallet
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.aws_server import READ, REGION, SIGN, Aws
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.sending import USDC, sending

databases, dsn = ledger_rig.databases, ledger_rig.dsn
chain, token = sending_rig.chain, sending_rig.token

PASSWORD = "what-opens-the-secret"
SM2 = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004") + b"\1" * 64
"""A public key of a curve that KMS has in some regions."""
PATIENT_S = 100.0
"""Of whoever asks a server that shares a busy machine: that it hangs is said by the test which makes it."""


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Aws]:
    aws = Aws(scratch)
    deadline = time.monotonic() + 100
    while not aws.ready():
        assert time.monotonic() < deadline, "moto's server does not answer"
        time.sleep(0.05)
    yield aws
    aws.close()


@pytest.fixture
def aws(server: Aws, monkeypatch: pytest.MonkeyPatch) -> Aws:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("CONNECT_S", "READ_S", "SIGN_S_MAX"):
        monkeypatch.setattr(of_aws, name, PATIENT_S)
    return server


@pytest.fixture
async def connection(dsn: str) -> AsyncIterator[Connection]:
    """Its transactions are open while KMS signs, which a busy machine does late."""
    made: Connection = await connect_to(dsn, idle_in_transaction_session_timeout="0")()
    yield made
    await made.close()


@pytest.fixture
def stored(aws: Aws, tmp_path: Path) -> tuple[str, str, bytes]:
    """A secret that holds a keystore: its source, its address, its key."""
    key, name = secrets.token_bytes(32), f"hot-{secrets.token_hex(4)}"
    address = write_keystore(tmp_path / "secret.json", PASSWORD, key)
    aws.make_secret(name, (tmp_path / "secret.json").read_text())
    return f"secretsmanager:{name}", address, key


async def test_kms_signs_low_s_and_with_the_parity_of_its_address(aws: Aws) -> None:
    signer = load_key(f"kms:{aws.make_key()}", "")
    digests = [secrets.token_bytes(32) for _ in range(24)]
    signatures = await signer.signatures(digests)
    assert all(0 < one.s <= ORDER // 2 for one in signatures), "half of what KMS answers is not"
    assert {one.y_parity for one in signatures} == {0, 1}


async def test_what_kms_and_a_secrets_key_sign_is_mined_and_pays_once(
    aws: Aws, stored: tuple[str, str, bytes], connection: Connection, dsn: str, chain: Anvil, token: Usdc
) -> None:
    kms, local = load_key(f"kms:{aws.make_key()}", ""), load_key(stored[0], PASSWORD, stored[1])
    async with sending(connection, connect_to(dsn), chain, token, kms, [local]) as desk:
        asked, process = await desk.ask(24), desk.process()
        told = await desk.signed(process, *asked)
        assert (await desk.nonces_of(kms), await desk.nonces_of(local)) == (list(range(12)), list(range(12)))
        raws = await desk.connection.fetch("SELECT tx_hash, raw FROM attempts ORDER BY tx_hash")
        await desk.sent(process, told)
        await desk.sent(process, [one._replace(id=f"{one.id}:again") for one in told])
        await desk.anvil.mine()
        assert sorted(to for to, _ in await desk.paid()) == sorted(one.recipient for one in asked)
        await desk.head(process)
        assert await desk.connection.fetch("SELECT tx_hash, raw FROM attempts ORDER BY tx_hash") == raws
        await assert_holds(desk.connection)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"code": "ThrottlingException"}, "ThrottlingException"),
        ({"code": "AccessDeniedException"}, "AccessDeniedException"),
        ({"code": "KMSInternalException"}, "KMSInternalException"),
        ({"hang_s": 6.0}, "has not signed"),
        ({"forge": True}, "no signature of"),
    ],
)
async def test_a_bad_day_of_kms_loses_nothing_and_what_waits_is_signed_when_it_is_over(
    aws: Aws, connection: Connection, dsn: str, chain: Anvil, token: Usdc, monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any], code: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(desks, "AWAY_S", 0.0)
    kms = load_key(f"kms:{aws.make_key()}", "")
    async with sending(connection, connect_to(dsn), chain, token, kms) as desk:
        asked, process = await desk.ask(3), desk.process()
        with aws.fault(SIGN, **fault), capture_logs() as logs, monkeypatch.context() as impatient:
            if "hang_s" in fault:  # the end of one read, tried twice, and that of all signatures come in either order
                impatient.setattr(of_aws, "SIGN_S_MAX", READ_S / 2)
            assert await desk.signed(process, *asked) == []
        assert code in repr(logs)
        assert await desk.nonces() == []
        assert await desk.lane() == (0, "paused", "key_unavailable")
        assert await desk.statuses() == {("signing", None): 3}
        await desk.anvil.mine()
        told = await desk.head(process)
        assert await desk.lane() == (3, "open", "")
        await desk.sent(process, told)
        await desk.anvil.mine()
        assert [to for to, _ in await desk.paid()] == [one.recipient for one in asked]
        await assert_holds(desk.connection)


async def test_while_kms_does_not_sign_the_other_lanes_pay_and_do_not_wait_for_it(
    aws: Aws, connection: Connection, dsn: str, chain: Anvil, token: Usdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "AWAY_S", 3_600.0)  # the while lasts until the test has looked
    kms, local = load_key(f"kms:{aws.make_key()}", ""), KeySigner(secrets.token_bytes(32))
    async with sending(connection, connect_to(dsn), chain, token, kms, [local]) as desk:
        process = desk.process()
        with aws.fault(SIGN, code="AccessDeniedException"):
            assert len(await desk.signed(process, *await desk.ask(4))) == 4
            assert await desk.nonces_of(local) == [0, 1, 2, 3]
            assert await desk.lane_of(kms) == ("paused", "key_unavailable")
        assert len(await desk.signed(process, *await desk.ask(2))) == 2
        assert await desk.nonces_of(kms) == [], "it is left alone for a while"
        fresh = desk.process()
        await desk.fund(usdc=USDC)
        assert len(await desk.signed(fresh, *await desk.ask(2))) == 2
        assert await desk.nonces_of(kms) == [0, 1]
        await assert_holds(desk.connection)


@pytest.mark.parametrize("key", [SM2, b"no key"], ids=["SM2", "garbage"])
def test_a_key_of_a_kind_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, key: bytes) -> None:
    """Whoever loads lanes' keys expects no other error: it would end the worker, and the next one at its start."""

    class Client:
        def get_public_key(self, **_: str) -> dict[str, Any]:
            return {"PublicKey": key, "KeyUsage": "SIGN_VERIFY"}

    monkeypatch.setattr(of_aws, "_client", lambda *_: Client())
    with pytest.raises(BadKeystore, match="kms:odd"):
        load_key("kms:odd", "")


def test_what_is_no_key_of_ours_is_refused_and_says_why(aws: Aws, stored: tuple[str, str, bytes]) -> None:
    source, _, _ = stored
    aws.make_secret("garbage", "correct horse battery staple")
    other = "0x" + "5" * 40
    kms = aws.make_key()
    elsewhere = kms.replace(REGION, "us-west-2")
    wrong: list[tuple[str, str, str | None, type[Exception], str]] = [
        (f"kms:{aws.make_key('ECC_NIST_P256')}", "", None, BadKeystore, "secp256k1"),
        ("kms:11111111-1111-1111-1111-111111111111", "", None, KeyUnavailable, "NotFoundException"),
        (f"kms:{elsewhere}", "", None, KeyUnavailable, "NotFoundException"),
        (f"kms:{kms}", "", other, WrongSigner, other),
        ("secretsmanager:nowhere", PASSWORD, None, KeyUnavailable, "ResourceNotFoundException"),
        ("secretsmanager:garbage", PASSWORD, None, BadKeystore, "not JSON"),
        (source, "a guess", None, WrongPassword, "does not open"),
        (source, PASSWORD, other, WrongSigner, other),
    ]
    for where, password, expected, kind, said in wrong:
        with pytest.raises(kind) as caught:
            load_key(where, password, expected)
        assert said in str(caught.value)
        assert "battery" not in "".join(traceback.format_exception(caught.value))
    with aws.fault(READ, code="ThrottlingException"), pytest.raises(KeyUnavailable):
        load_key(source, PASSWORD)


def test_a_setting_that_names_the_wrong_key_stops_the_worker_with_its_name(
    aws: Aws, stored: tuple[str, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wallet(**given: str) -> Signer:
        return hot_wallet(load_settings(env_file=None, **given))

    kms = f"kms:{aws.make_key()}"
    assert wallet(withdrawal_keystore=kms).address.startswith("0x"), "it needs no password"
    found = wallet(withdrawal_keystore=stored[0], withdrawal_keystore_password=PASSWORD)
    assert found.address == stored[1]
    wrong = [
        ({"withdrawal_keystore": kms, "withdrawal_signer": stored[1]}, "WITHDRAWAL_SIGNER"),
        ({"withdrawal_keystore": "/none", "withdrawal_keystore_password": PASSWORD}, "WITHDRAWAL_KEYSTORE"),
        ({"withdrawal_keystore": stored[0]}, "WITHDRAWAL_KEYSTORE_PASSWORD"),
        ({"withdrawal_keystore": stored[0], "withdrawal_keystore_password": "x"}, "WITHDRAWAL_KEYSTORE_PASSWORD"),
    ]
    for given, name in wrong:
        with pytest.raises(ConfigError) as caught:
            wallet(**given)
        assert caught.value.problems[0].name == f"STABLERAIL_{name}"
    # AWS may have it a moment later, and a worker that ends as one with wrong settings is not started anew
    with pytest.raises(KeyUnavailable, match=r"STABLERAIL_WITHDRAWAL_KEYSTORE: .*NotFoundException"):
        wallet(withdrawal_keystore="kms:alias/none")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(KeyUnavailable, match=r"STABLERAIL_WITHDRAWAL_KEYSTORE: .*EndpointConnectionError"):
        wallet(withdrawal_keystore=kms)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    with pytest.raises(KeyUnavailable, match="NoRegionError"):
        wallet(withdrawal_keystore="kms:alias/none")


def test_nothing_of_a_secret_is_logged_though_everything_is(
    aws: Aws, stored: tuple[str, str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    source, address, key = stored
    with caplog.at_level(logging.DEBUG):
        signer = load_key(source, PASSWORD)
        with pytest.raises((KeystoreError, SignerError)) as caught:
            load_key(source, "a guess of mine")
    shown = caplog.text + repr(signer) + "".join(traceback.format_exception(caught.value))
    for secret in (key.hex(), repr(key)[2:-1], PASSWORD, "ciphertext", "test-secret-access-key"):
        assert secret not in shown
    assert address in shown, "what is looked through is what was said"
    kms = load_key(f"kms:{aws.make_key()}", "")
    for one in (signer, kms):
        with pytest.raises(TypeError, match="does not leave"):
            pickle.dumps(one)
