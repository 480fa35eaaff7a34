"""`make demo`: a KYC approval becomes wallets, a real USDC transfer becomes a balance, at once and then final; a withdrawal
reaches the chain once, though its worker is killed between signature and sending.

Everything runs on this machine in `.dev/demo`: Kafka, PostgreSQL, a chain, the vendors' sandboxes, the bridge, the API
and a worker per movement. It begins empty each time and ends with this process, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import asyncpg
from aiohttp import ClientError
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.markup import escape

import stablerail
from chain.errors import ChainError
from ledger.accounts import custody, pending_withdrawal, spendable
from stablerail.config import ALSO_CALLED, PREFIX, Settings, load_settings
from stablerail.connections import connector
from stablerail.demo_story import AMOUNT, Story, StoryBroken, describe
from stablerail.demo_view import Check, showing, step, summary
from stablerail.demo_withdrawal import HOT_WALLET, WITHDRAWN, Withdrawing, fund, node_at
from stablerail.dev.errors import DevError, PartFailed
from stablerail.dev.fetch import fetch
from stablerail.dev.gate import Gate
from stablerail.dev.parts import Parts, until_signal
from stablerail.dev.processes import tail
from stablerail.dev.stack import PROGRAMS, Stack
from stablerail.keys import Scope, create_key
from stablerail.movements import MOVEMENTS
from stablerail.verify import verify_all
from topics.events import Chain, Event
from topics.money import SCALE, format_amount

DIRECTORY: Final = Path(".dev/demo")
AGREE_TIMEOUT_S: Final = 60.0
"""A record's row may wait a moment after its event was seen; what still differs then does differ."""
EXIT_INTERRUPTED: Final = 130
_BALANCE: Final = (
    "SELECT sum(CASE direction WHEN 'd' THEN amount ELSE -amount END)::text FROM entries WHERE account_id = $1"
)
_FAILURES: Final = (DevError, StoryBroken, ChainError, asyncpg.PostgresError, KafkaError, ClientError, OSError)

DEPOSIT_SCRIPT: Final = """\
#!/bin/sh
# deposit.sh [ADDRESS [WHOLE_USDC]]: real USDC from the account that the chain's node signs for
to=$(echo "${{1:-{wallet}}}" | cut -c3-)
data=$(printf '0xa9059cbb%024d%s%064x' 0 "$to" "$(( ${{2:-10}} * {scale} ))")
curl --silent --show-error --header 'content-type: application/json' {rpc_url} --data \\
  '{{"jsonrpc":"2.0","id":1,"method":"eth_sendTransaction","params":[{{"from":"{payer}","to":"{token}","data":"'$data'"}}]}}'
echo
"""
APPROVE_SCRIPT: Final = """\
#!/bin/sh
# approve.sh CUSTOMER_ID: Sumsub approves another customer
curl --silent --show-error --header 'content-type: application/json' {sumsub}/_control/review \\
  --data '{{"externalUserId":"'"${{1:?a customer id}}"'","answer":"GREEN"}}'
echo
"""


def run_demo(once: bool) -> int:
    """Tells the story and stays up until Ctrl-C or SIGTERM; `once`: ends by itself.

    0 when the balance, the chain and the ledger agreed, 130 when it was interrupted before, else 1 with the reason.
    """
    console, directory = Console(), DIRECTORY.absolute()
    try:
        tools = fetch(console=console)
        _stand_alone(directory)
        demo = _Demo(directory, Parts(directory / "parts", tools), console)
        asyncio.run(until_signal(demo.run(once)))
        return demo.code
    except _FAILURES as error:
        where = f"; logs: {DIRECTORY}" if isinstance(error, StoryBroken) else ""
        console.print(f"✗ {error}{where}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _stand_alone(directory: Path) -> None:
    """Settings of this shell or of a `.env` here are for another deployment: the demo's programs must not see them."""
    for name in list(os.environ):
        if name in ALSO_CALLED.values() or (name.startswith(PREFIX) and not name.startswith(f"{PREFIX}DEV_")):
            del os.environ[name]
    os.environ["PYTHONPATH"] = str(Path(stablerail.__file__).parent.parent)  # so that they start from anywhere
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)


class _Demo:
    def __init__(self, directory: Path, parts: Parts, console: Console) -> None:
        self._directory = directory
        self._parts = parts
        self._console = console
        self._stack: Stack | None = None
        self._gate: Gate | None = None
        self.code = EXIT_INTERRUPTED
        """How the process ends, if it is interrupted now."""

    async def run(self, once: bool) -> None:
        try:
            with step(self._console, "Kafka, PostgreSQL, and a chain with Circle's USDC"):
                await self._parts.start()
            story, withdrawing, key, settings = await self._start()
            async with asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(self._guard()),
                    group.create_task(story.watch_topics(settings.kafka_bootstrap, settings.topic_prefix)),
                    group.create_task(story.watch_circle()),
                ]
                with showing(self._console, story):
                    await story.run()
                self.code = await self._agreement(story, withdrawing, settings)
                if not once:
                    await self._stay(story, key)
                for task in beside:
                    task.cancel()
        except BaseExceptionGroup as group_error:
            raise self._ended() or _first(group_error) from None
        finally:
            self._console.print("stopping everything", style="dim")
            await asyncio.to_thread(self._stop)
            if self._gate is not None:
                await self._gate.stop()

    async def _start(self) -> tuple[Story, Withdrawing, str, Settings]:
        directory = self._directory / "stack"
        shutil.rmtree(directory, ignore_errors=True)  # the parts' lock is ours: nobody writes there
        stack = self._stack = Stack(directory, self._parts.environment())
        with step(self._console, "schema and topics"):
            await stack.prepare()
        with step(self._console, "Circle's and Sumsub's sandboxes, bridge, API, a worker per movement"):
            self._gate = gate = Gate(self._parts.anvil.rpc_url)
            await gate.start()
            stack.start_sandboxes()
            stack.start([name for name in PROGRAMS if name != "withdrawals"])
            stack.start(("withdrawals",), node_at(gate))
            await stack.wait_ready()
            await asyncio.to_thread(stack.wait_listening, ("circle", "sumsub"))
            await stack.subscribe()
        given = {name.removeprefix(PREFIX).lower(): value for name, value in stack.environment.items()}
        settings = load_settings(env_file=None, **given)
        connection = await connector(settings)()
        try:
            key = (await create_key(connection, [Scope.READ, Scope.WITHDRAW], "demo")).token.get_secret_value()
            with step(self._console, "gas and USDC for the hot wallet"):
                await fund(stack, self._parts.usdc, connection)
        finally:
            await connection.close()
        story = Story(stack, self._parts.usdc, key, settings.finality_depths_blocks[Chain.MATIC])
        withdrawing = Withdrawing(story, stack, self._parts.usdc, gate, key)
        story.add(withdrawing)
        return story, withdrawing, key, settings

    def _stop(self) -> None:
        if self._stack is not None:
            self._stack.stop()
        self._parts.stop()

    async def _guard(self) -> None:
        """Raises PartFailed when a part or program ends by itself."""
        while True:
            if failed := self._ended():
                raise failed
            await asyncio.sleep(0.3)

    def _ended(self) -> PartFailed | None:
        """The part or program that ended by itself: the cause of whatever else went wrong."""
        assert self._stack is not None
        if part := self._parts.failure():
            return PartFailed(f"{part} ended by itself", f"logs: {self._parts.directory}")
        for name, child in self._stack.children.items():
            if (code := child.returncode) is not None:
                return PartFailed(f"{name} ended by itself with {code}: {tail(child.log)}", f"log: {child.log}")
        return None

    # -- the end -----------------------------------------------------------------------------------------------------

    async def _agreement(self, story: Story, withdrawing: Withdrawing, settings: Settings) -> int:
        """Compares what the API, the chain and the ledger say, and shows it. 0 when they agree."""
        deadline = asyncio.get_running_loop().time() + AGREE_TIMEOUT_S
        while True:
            checks = await self._checks(story, withdrawing, settings)
            agree = all(check.holds for check in checks)
            if agree or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.5)
        self._console.print()
        self._console.print(summary(checks))
        if not agree:
            differ = "; ".join(f"{check.what}: {check.found}" for check in checks if not check.holds)
            self._console.print(f"✗ {differ}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 0 if agree else 1

    async def _checks(self, story: Story, withdrawing: Withdrawing, settings: Settings) -> list[Check]:
        balance = await story.balance()
        wallet = await self._parts.usdc.balance_of(story.wallet)
        accounts = {
            "usdc_balance": (spendable(story.user_id), AMOUNT - WITHDRAWN),
            "pending_withdrawal": (pending_withdrawal(story.user_id), 0),
            "custody_usdc": (custody(Chain.MATIC), AMOUNT + HOT_WALLET - WITHDRAWN),
        }
        connection = await connector(settings)()
        try:
            entries = {name: int(await connection.fetchval(_BALANCE, a.id) or 0) for name, (a, _) in accounts.items()}
        finally:
            await connection.close()
        left = format_amount(AMOUNT - WITHDRAWN)
        found = [
            Check("available, by the API", balance["available"], balance["available"] == left),
            Check("of it not final, by the API", balance["not_final"], balance["not_final"] == format_amount(0)),
            Check("balanceOf(wallet), by the chain", format_amount(wallet), wallet == AMOUNT),
            *await withdrawing.checks(),
            *(
                Check(f"{name}, by the ledger's entries", format_amount(entries[name]), entries[name] == wanted)
                for name, (_, wanted) in accounts.items()
            ),
        ]
        results = await verify_all(settings)
        broken = [f"{result.number} {result.name}: {result.offending[0]}" for result in results if not result.holds]
        numbers = ", ".join(str(result.number) for result in results)
        told = "; ".join(broken) or f"{numbers} hold"
        return [*found, Check("invariants, by stablerail verify", told, not broken)]

    async def _stay(self, story: Story, key: str) -> None:
        """Shows what comes, until it is cancelled."""
        console, url = self._console, self._stack_url
        self._write_files(story, key)
        bearer = f'-H "Authorization: Bearer $(cat {DIRECTORY / "key"})"'
        console.print()
        for name, place in (
            ("API", f"{url('api')}/docs"),
            ("  key", key),
            ("  try", f"curl {bearer} {url('api')}/v1/users/{story.user_id}/deposits"),
            *((f"worker {name}", f"{url(name)}/flow, /metrics, /readyz") for name in MOVEMENTS),
            ("lanes", f"{url('withdrawals')}/nonces, /withdrawals"),
            ("bridge", f"{url('bridge')}/metrics, /readyz; webhooks to /webhooks/circle and /webhooks/kyc/sumsub"),
            ("metrics of the API", f"{url('api')}/metrics"),
            ("logs", f"{DIRECTORY / 'stack'}, {DIRECTORY / 'parts'}"),
            ("withdraw", f"curl {bearer} -H 'Idempotency-Key: 1' {url('api')}/v1/withdrawals --json '{_asks(story)}'"),
            ("deposit again", f"sh {DIRECTORY / 'deposit.sh'} [ADDRESS [WHOLE_USDC]]"),
            ("another customer", f"sh {DIRECTORY / 'approve.sh'} CUSTOMER_ID"),
        ):
            console.print(f"[dim]{name:18}[/]  {escape(place)}", highlight=False, soft_wrap=True)
        console.print("\nUp until Ctrl-C; what happens meanwhile:", style="bold")

        def line(topic: str, event: Event | None, headers: Any) -> None:
            told = describe(topic, event, headers)
            if told is not None:
                style = "red" if event is None else None
                console.print(f"  {topic:20} {told}", style=style, markup=False, highlight=False, soft_wrap=True)

        story.event_listeners.append(line)
        await asyncio.Event().wait()

    def _stack_url(self, name: str) -> str:
        assert self._stack is not None
        return self._stack.url(name)

    def _write_files(self, story: Story, key: str) -> None:
        usdc = self._parts.usdc
        deposit = DEPOSIT_SCRIPT.format(
            wallet=story.wallet, scale=SCALE, rpc_url=usdc.anvil.rpc_url, payer=usdc.payer, token=usdc.address
        )
        approve = APPROVE_SCRIPT.format(sumsub=self._stack_url("sumsub"))
        for name, text in (("key", key), ("deposit.sh", deposit), ("approve.sh", approve)):
            path = self._directory / name
            path.unlink(missing_ok=True)
            path.touch(mode=0o600)
            path.write_text(text)


def _asks(story: Story) -> str:
    """The body of a withdrawal to an address that is nobody's."""
    amount, to = format_amount(SCALE), "0x" + "d1" * 20
    return json.dumps({"user_id": story.user_id, "chain": Chain.MATIC, "asset": "USDC", "amount": amount, "to": to})


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
