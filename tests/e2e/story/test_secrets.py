"""No secret leaves: after a run of the whole product, all that it wrote, said and stored is searched for each of them."""

from __future__ import annotations

import base64
import uuid
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import aiohttp
import zstandard

from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from ledger.record import BYTES_MAX
from stablerail.dev.processes import free_port
from tests.support.story import Story, message
from topics.catalog import DEPOSITS_NOTIFIED, JOURNAL, TOPICS

LEAST = {"deposits.credited", "deposits.finalized", "kyc.approved", "wallets.provisioned", "chain.heads", "journal"}


def secrets_of(story: Story, api_key: str) -> dict[str, bytes]:
    """Every secret of the run, also as it looks in URLs and Base64; the API key without its public id."""
    password = urlsplit(story.dsn).password
    assert password
    plain = {
        "Circle's API key": TEST_API_KEY,
        "the entity secret": TEST_ENTITY_SECRET,
        "Sumsub's secret": story.stack.environment["STABLERAIL_SUMSUB_WEBHOOK_SECRET"],
        "the database's password": password,
        "an API key of ours": api_key.rpartition("_")[2],
    }
    found = {}
    for name, secret in plain.items():
        assert len(secret) >= 16, name
        found[name] = secret.encode()
        found[f"{name}, Base64"] = base64.b64encode(secret.encode()).rstrip(b"=")[:-1]
        found[f"{name}, in a URL"] = quote(secret, safe="").encode()
    found["the entity secret, raw"] = bytes.fromhex(TEST_ENTITY_SECRET)
    return found


async def test_no_secret_is_in_any_log_topic_metric_answer_or_table(story: Story) -> None:
    api_key = await story.api_key("read")
    user, wallets = await story.customer()
    await story.usdc.transfer(wallets["MATIC"], 3_000_000)
    await story.finalized(wallets["MATIC"], 1)
    sent = await story.produce(DEPOSITS_NOTIFIED, message("k", {"oops": uuid.uuid4().hex}))
    await story.letters(DEPOSITS_NOTIFIED, sent)
    said = await _answers(story, user, api_key)
    said |= await _commands(story)
    for path in Path(story.stack.directory).rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError):  # programs that run make files and remove them
            said[path.name] = path.read_bytes()
    said |= await _tables(story)
    topics = await _topics(story)
    assert {name for name, content in topics.items() if content} >= LEAST
    said |= topics
    assert all(f"{program}.log" in said for program in story.stack.children)
    hidden = secrets_of(story, api_key)
    assert [
        (place, name) for place, content in said.items() for name, secret in hidden.items() if secret in content
    ] == []
    # the search itself finds what is there
    assert any(user.encode() in content for content in topics.values())
    assert user.encode() in said["journal"]


async def _answers(story: Story, user: str, api_key: str) -> dict[str, bytes]:
    """Metrics and health of every program, and the API's answers, refusals too."""
    stack, found = story.stack, {}
    paths = {"bridge": ["/metrics", "/readyz"], "api": ["/metrics", "/readyz", "/openapi.json", "/docs"]}
    workers = ("onboarding", "deposits", "chains", "withdrawals", "investing", "treasury", "recovery")
    paths |= {worker: ["/metrics", "/readyz", "/flow"] for worker in workers}
    paths["withdrawals"] += ["/withdrawals", "/nonces"]
    paths["treasury"].append("/buffers")
    async with aiohttp.ClientSession() as session:
        for program, some in paths.items():
            for path in some:
                async with session.get(stack.url(program) + path) as answer:
                    assert answer.status == 200, (program, path)
                    found[f"{program}{path}"] = await answer.read() + repr(answer.raw_headers).encode()
        for what in ("balances", "wallets", "deposits"):
            for token in (api_key, api_key[:-2] + "zz", "x"):
                headers = {"Authorization": f"Bearer {token}"}
                async with session.get(f"{stack.url('api')}/v1/users/{user}/{what}", headers=headers) as answer:
                    assert answer.status == (200 if token == api_key else 401)
                    found[f"{what} {answer.status} {token[-2:]}"] = (
                        await answer.read() + repr(answer.raw_headers).encode()
                    )
    return found


async def _commands(story: Story) -> dict[str, bytes]:
    """What the command line prints, also when something is wrong."""
    away = story.dsn.replace(f":{urlsplit(story.dsn).port}/", f":{free_port()}/")
    assert away != story.dsn
    wrong = {
        "away": {"STABLERAIL_DATABASE_URL": away},
        "no database": {"STABLERAIL_DATABASE_URL": story.dsn + "_none"},
        "entity secret": {"STABLERAIL_CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET + "zz"},
        "port": {"STABLERAIL_API_PORT": "many"},
    }
    found = {}
    for command in ("config", "verify", "keys list", "topics list"):
        code, found[f"stablerail {command}"] = await story.command(*command.split())
        assert code == 0, found[f"stablerail {command}"].decode()
    for name, environment in wrong.items():
        code, found[f"stablerail verify: {name}"] = await story.command("verify", environment=environment)
        assert code != 0
        assert b"Traceback" not in found[f"stablerail verify: {name}"]
    return found


async def _topics(story: Story) -> dict[str, bytes]:
    """Every topic's keys, values and headers in one; the journal's records unpacked."""
    found = {}
    for topic in TOPICS:
        parts: list[bytes] = []
        halves = b""
        for record in await story.records(topic):
            value = record.value or b""
            if topic is JOURNAL:
                place = {name: int(number) for name, number in record.headers}
                halves += value
                if place.get("part", 0) + 1 < place.get("parts", 1):
                    continue
                value = zstandard.ZstdDecompressor().decompress(halves, max_output_size=BYTES_MAX)
                halves = b""
            parts += [record.key or b"", value, *(name.encode() + (text or b"") for name, text in record.headers)]
        found[topic.name] = b"\n".join(parts)
    return found


async def _tables(story: Story) -> dict[str, bytes]:
    """Every row of every table, as text."""
    found = {}
    for (name,) in await story.rows("SELECT tablename::text FROM pg_tables WHERE schemaname = 'stablerail'"):
        rows = await story.rows(f'SELECT t::text FROM "{name}" t')
        found[f"table {name}"] = "\n".join(row for (row,) in rows).encode()
    assert {"table calls", "table api_keys"} <= found.keys()
    return found
