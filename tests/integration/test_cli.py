"""The command line: what it says when something is missing, and its exit codes, on real parts."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka.admin import NewTopic
from click.testing import Result
from typer.testing import CliRunner

from stablerail.cli import app
from stablerail.cli_base import err, show
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, inspect
from tests.support import ledger_rig
from tests.support.invariants import may_break
from tests.support.ledger_rig import connect_to
from tests.support.patience import ENVIRONMENT
from topics.catalog import KYC_APPROVED

databases, dsn = ledger_rig.databases, ledger_rig.dsn

ROOT = Path(__file__).parents[2]
SECRET = "s3cret-of-nobody"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's own, and no broker that somebody happens to run here; room for whole lines."""
    for name in os.environ.keys() - ENVIRONMENT.keys():
        if name.startswith("STABLERAIL_") and not name.startswith("STABLERAIL_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", "127.0.0.1:1")
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def invoke(*arguments: str, **environment: str) -> Result:
        for name, value in environment.items():
            monkeypatch.setenv(f"STABLERAIL_{name.upper()}", value)
        return CliRunner().invoke(app, arguments)

    return invoke


def test_config_prints_every_setting_and_no_secret(run: Callable[..., Result]) -> None:
    result = run(
        "config",
        database_url=f"postgresql://user:{SECRET}@db.example/ledger",
        circle_api_key=f"TEST_API_KEY:1:{SECRET}",
        circle_entity_secret="ab" * 32,
        rpc_urls='{"ETH": ["https://rpc.example/v1/' + SECRET + '"]}',
    )
    assert result.exit_code == 0
    assert SECRET not in result.output
    assert "ab" * 32 not in result.output
    assert "postgresql://user:********@db.example/ledger" in result.output
    assert "STABLERAIL_WORKER_UNASSIGNED_TIMEOUT_S" in result.output


def test_config_prints_brackets_as_they_are(run: Callable[..., Result]) -> None:
    address = "http://[fd00::1]:8545"
    result = run("config", circle_wallet_set_id="[/x]", rpc_urls='{"ETH": ["' + address + '"]}')
    assert result.exit_code == 0
    assert "[/x]" in result.output
    assert address in result.output


def test_config_says_which_names_have_no_effect(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no effect" not in run("config").stderr
    monkeypatch.setenv("ONCHAIN_WITHDRAWAL_TIMEOUT", "5m")
    result = run("config")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("ONCHAIN_WITHDRAWAL_TIMEOUT has no effect: ")
    assert "has no effect" not in result.stdout


def test_help_shows_brackets_as_they_are(run: Callable[..., Result]) -> None:
    for command in ("ledger balance", "ledger statement", "ledger close"):
        assert "owner.type[shard]:ASSET" in run(*command.split(), "--help").output, command


def test_help_names_who_approves_only_where_somebody_does(run: Callable[..., Result]) -> None:
    for command in ("chains rescan", "deny add", "tx cancel", "ledger close"):
        assert "approves" not in run(*command.split(), "--help").output, command
    assert "approves" in run("ledger", "correct", "request", "--help").output


def test_data_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    data = ("[red]x[/red]", "[/x]", "a:id:b", "y" * 500)
    found = [{"name": one, "at": None, "tags": ["a", "b"]} for one in data]
    show("table", ("name", "at", "tags"), found)
    err.print("\n".join(data))
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["name", *data], "one line each, nothing eaten"
    assert said.err.splitlines() == list(data)
    show("json", ("name",), found)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_what_is_no_answer_is_on_stderr(run: Callable[..., Result], database: str, kafka: Kafka) -> None:
    """A migration logs, a journal that Kafka does not take is told: the answer alone is on stdout."""
    made = run("migrate", database_url=database)
    assert (made.exit_code, made.stdout) == (0, "schema stablerail is at the newest revision\n")
    key = run("keys", "create", "--scope", "read")
    assert (key.exit_code, len(key.stdout.split()), key.stdout[:3]) == (0, 1, "sr_")
    assert key.stderr == "Kafka is not reachable: the next worker journals what was committed\n"
    for command in (("verify", "--kafka"), ("rebuild",)):
        away = run(*command)
        assert (away.exit_code, away.stdout, away.stderr.count("\n")) == (69, "", 1), away.output
        assert away.stderr.startswith("KafkaConnectionError: Unable to bootstrap")


READERS = (
    "config", "topics list", "keys list", "limits list", "lanes list", "lanes top-ups", "deny list", "shortfall list", "dlq list",
    "audit list", "audit verify", "ledger correct list", "ledger trial-balance", "workers status", "recovery status",
    "reconcile --history", "verify ledger",
)  # fmt: skip


@pytest.mark.parametrize("command", READERS)
def test_what_lists_or_shows_gives_json_alone(
    run: Callable[..., Result], dsn: str, kafka: Kafka, topic_prefix: str, command: str
) -> None:
    result = run(
        *command.split(), "--format", "json",
        database_url=dsn, kafka_bootstrap=kafka.bootstrap, topic_prefix=topic_prefix,
    )  # fmt: skip
    assert result.exit_code == (1 if command == "topics list" else 0), result.output
    try:
        json.loads(result.stdout or "{}")
    except ValueError:
        assert [type(json.loads(line)) for line in result.stdout.splitlines()] == [dict] * result.stdout.count("\n")


@pytest.mark.parametrize(
    "command", ["config", "config --format json", "keys list", "ledger trial-balance --format csv"]
)
def test_whoever_reads_may_stop_reading(dsn: str, command: str) -> None:
    """As `| head`: no word and no traceback, and no exit code that means something else."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        (sys.executable, "-m", "stablerail.cli", *shlex.split(command)),
        env={**os.environ, "STABLERAIL_DATABASE_URL": dsn}, stdout=writing, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("module", "command"), [("typer", "config"), ("stablerail.topics_admin", "topics list"), ("stablerail.worker", "worker deposits")]
)  # fmt: skip
def test_ctrl_c_while_it_is_imported_ends_it_without_a_word(module: str, command: str) -> None:
    """Half a second in which an impatient person presses it; `module` is what is imported then."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["stablerail"]
    program = f"""
import importlib.metadata, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
class Impatient:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Impatient())
sys.argv = ["stablerail", *{command.split()!r}]
sys.exit(importlib.metadata.EntryPoint("stablerail", {entry!r}, "console_scripts").load()())
"""
    environment = {**os.environ, "STABLERAIL_DATABASE_URL": "postgresql://u:p@127.0.0.1:1/d"}
    done = subprocess.run((sys.executable, "-c", program), env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_the_commands_are_put_together_ends_it_without_a_word() -> None:
    """Between the imports and the command: Typer makes all of them, for a tenth of a second."""
    program = """
import os, signal, typer.main
signal.signal(signal.SIGINT, signal.default_int_handler)
def impatient(*_):
    os.kill(os.getpid(), signal.SIGINT)
typer.main.get_params_from_function = impatient
from stablerail.__main__ import main
main()
"""
    done = subprocess.run((sys.executable, "-c", program, "config"), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "command",
    [
        "ledger correct request --reason r --debit a.usdc_balance:USDC=1 --credit system.suspense_usdc:USDC=1",
        "ledger correct approve 00000000000000000000000000000001",
        "ledger correct reject 00000000000000000000000000000001",
        "suspense assign ada 1 --reason r",
        "shortfall settle 00000000000000000000000000000001 --write-off --reason r",
    ],
)
def test_where_it_takes_two_nobody_is_guessed(run: Callable[..., Result], command: str) -> None:
    nowhere = "postgresql://u:p@127.0.0.1:1/d"
    for more in ((), ("--actor", " ")):
        nobody = run(*command.split(), *more, database_url=nowhere)
        assert (nobody.exit_code, "--actor NAME, or STABLERAIL_ACTOR" in nobody.stderr) == (2, True), nobody.output
    assert run(*command.split(), actor="ann").exit_code == 69


def test_an_argument_that_is_no_text_is_refused_by_its_place(run: Callable[..., Result]) -> None:
    refused = run("ledger", "correct", "request", "--reason", os.fsdecode(b"because \xff"))
    assert refused.exit_code == 2
    assert "argument 5 is not UTF-8" in refused.output


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["migrate"], {}, "STABLERAIL_DATABASE_URL"),
        (["verify"], {}, "STABLERAIL_DATABASE_URL"),
        (["api"], {}, "STABLERAIL_DATABASE_URL"),
        (["bridge"], {}, "STABLERAIL_SUMSUB_WEBHOOK_SECRET"),
        (["keys", "list"], {}, "STABLERAIL_DATABASE_URL"),
        (["worker", "deposits"], {}, "STABLERAIL_DATABASE_URL"),
        (["worker", "onboarding"], {"database_url": "postgresql://u:p@h/d"}, "STABLERAIL_CIRCLE_ENTITY_SECRET"),
        (["worker"], {}, "STABLERAIL_CIRCLE_API_KEY"),
        (["config"], {"deposit_minimum": SECRET}, "STABLERAIL_DEPOSIT_MINIMUM"),
        (["config"], {"depsit_minimum": "1"}, "did you mean STABLERAIL_DEPOSIT_MINIMUM"),
        (["topics", "list"], {"kafka_bootstrap": SECRET}, "STABLERAIL_KAFKA_BOOTSTRAP"),
    ],
)
def test_a_wrong_or_missing_setting_is_named_and_ends_the_program_with_78(
    run: Callable[..., Result], arguments: list[str], environment: dict[str, str], named: str
) -> None:
    result = run(*arguments, **environment)
    assert result.exit_code == 78
    assert named in result.output
    assert SECRET not in result.output


def test_an_unknown_movement_is_named_with_those_there_are(run: Callable[..., Result]) -> None:
    result = run("worker", "deposits", "depositz", database_url="postgresql://u:p@h/d")
    assert result.exit_code == 2
    assert (
        "unknown movement depositz; there are onboarding, deposits, chains, withdrawals, investing, treasury, recovery"
        in result.output
    )


@pytest.mark.parametrize("port", [0, 65_535])
def test_ports_that_there_are_not_are_refused_before_anything_starts(run: Callable[..., Result], port: int) -> None:
    arguments = ["deposits", "chains", "--port", str(port)]
    result = run("worker", *arguments, database_url="postgresql://u:p@h/d", rpc_urls="{}")
    assert result.exit_code == 2
    assert f"2 ports from {port} on: there are 1 to 65535, and each movement takes one" in result.output


@pytest.mark.parametrize("command", [["migrate"], ["verify"], ["keys", "list"], ["topics", "list"]])
def test_what_cannot_be_reached_is_said_in_one_line(run: Callable[..., Result], command: list[str]) -> None:
    result = run(*command, database_url=f"postgresql://u:{SECRET}@127.0.0.1:1/d", kafka_bootstrap="127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (69, "")
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert SECRET not in result.output
    assert len(result.stderr.splitlines()) == 1


def test_migrate_makes_the_schema_and_changes_nothing_the_second_time(
    run: Callable[..., Result], database: str
) -> None:
    for _ in range(2):
        result = run("migrate", database_url=database)
        assert result.exit_code == 0
        assert "newest revision" in result.output
    assert run("verify").exit_code == 0
    other = run("verify", database_schema="other")
    assert (other.exit_code, "`stablerail migrate` makes the schema" in other.stderr) == (69, True)


def test_a_roll_out_migrates_in_two_parts(run: Callable[..., Result], database: str) -> None:
    for part in ("pre", "post"):
        result = run("migrate", "--only", part, database_url=database)
        assert result.exit_code == 0
        assert f"newest {part} revision" in result.output
    assert run("verify").exit_code == 0
    assert run("migrate", "--only", "later").exit_code == 2


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked_once(run: Callable[..., Result], dsn: str) -> None:
    made = run("keys", "create", "--scope", "read", "--scope", "admin", "--name", "console", database_url=dsn)
    assert made.exit_code == 0
    token = made.stdout.strip()
    prefix, key_id, secret = token.split("_")
    assert prefix == "sr"
    listed = run("keys", "list")
    assert key_id in listed.output
    assert "admin, read" in listed.output
    assert secret not in listed.output
    assert run("keys", "create", "--scope", "read", "--name", "[/x]").exit_code == 0
    assert "[/x]" in run("keys", "list").output
    assert run("keys", "revoke", key_id).exit_code == 0
    again = run("keys", "revoke", key_id)
    assert (again.exit_code, isinstance(again.exception, SystemExit)) == (1, True)
    assert run("keys", "create", "--scope", "write").exit_code == 2
    nameless = run("keys", "create", "--scope", "read", "--name", "")
    assert (nameless.exit_code, isinstance(nameless.exception, SystemExit)) == (2, True)
    assert "printable name" in nameless.output


def test_verify_says_what_is_broken_by_its_exit_code(run: Callable[..., Result], dsn: str) -> None:
    may_break(dsn, "a balance is made up")
    good = run("verify", database_url=dsn)
    assert good.exit_code == 0
    assert good.output.count("holds") == 12

    async def damage() -> None:
        connection = await connect_to(dsn)()
        await connection.execute(
            "INSERT INTO accounts VALUES (gen_random_uuid(), 'ada', 'usdc_balance', 'USDC', '', 5, 1, now())"
        )
        await connection.close()

    asyncio.run(damage())
    bad = run("verify")
    assert bad.exit_code == 1
    assert bad.output.count("BROKEN") == 2
    assert "ada" not in bad.output or "difference" in bad.output


def test_verify_says_in_one_line_that_a_chain_cannot_be_read(run: Callable[..., Result], dsn: str) -> None:
    result = run(
        "verify",
        database_url=dsn,
        rpc_urls='{"MATIC": ["http://127.0.0.1:1/' + SECRET + '"]}',
        usdc_contracts='{"MATIC": "0x' + "1" * 40 + '"}',
        rpc_timeout_s="1",
    )
    assert result.exit_code == 69
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert SECRET not in result.output


def test_topics_are_created_once_and_listed(run: Callable[..., Result], kafka: Kafka, topic_prefix: str) -> None:
    missing = run("topics", "list", kafka_bootstrap=kafka.bootstrap, topic_prefix=topic_prefix)
    assert missing.exit_code == 1
    assert missing.output.count("missing") > 10
    made = run("topics", "create")
    assert made.exit_code == 0
    assert f"created {topic_prefix}deposits.notified" in made.output
    assert "missing" not in made.output
    again = run("topics", "create")
    assert again.exit_code == 0
    assert "created" not in again.output
    good = run("topics", "list")
    assert good.exit_code == 0
    assert topic_prefix + "journal" in good.output


def test_a_topic_that_differs_is_left_as_it_is_and_told_by_the_exit_code(
    run: Callable[..., Result], kafka: Kafka, topic_prefix: str
) -> None:
    async def make() -> None:
        async with admin(kafka.bootstrap) as client:
            configs = {"retention.ms": "1000", "cleanup.policy": "compact"}
            await client.create_topics([NewTopic(f"{topic_prefix}kyc.approved", 6, 1, topic_configs=configs)])
            while not (await inspect(client, topic_prefix, [KYC_APPROVED]))[0].exists:
                await asyncio.sleep(0.05)

    asyncio.run(make())
    made = run("topics", "create", kafka_bootstrap=kafka.bootstrap, topic_prefix=topic_prefix)
    drifted = run("topics", "list")
    assert (made.exit_code, drifted.exit_code) == (0, 1)
    for difference in (
        "partitions 6, declared 4",
        "retention.ms 1000, declared 604800000",
        "cleanup.policy compact, declared delete",
    ):
        assert difference in made.output
        assert difference in drifted.output
