"""`stablerail limits list|set|unset`: limits that hold from the next decision on, without a restart; each change is a log."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from ledger import limits
from ledger.limits import Limit
from ledger.rows import Connection
from stablerail.cli_base import EXIT_USAGE, Actor, Format, changed, fail, looked_up, needed_settings, out, show
from topics.money import format_amount, parse_amount

limits_app = typer.Typer(no_args_is_help=True, help="Limits that change while the system runs; amounts in USDC.")

Name = Annotated[str, typer.Argument(help="as `limits list` shows it: withdrawal.max.MATIC")]


@limits_app.command("list")
def limits_list(format: Format = "table") -> None:
    """Every limit that holds, and who set it."""
    there: dict[str, Limit] = looked_up(limits.list_limits)
    found = []
    for name, default in _known().items():
        held = {"name": name, "value": format_amount(default), "default": format_amount(default)}
        if one := there.get(name):
            held["value"] = format_amount(one.value)
        found.append({**held, "set_by": one and one.updated_by, "set_at": one and one.updated_at})
    show(format, ("name", "value", "default", "set_by", "set_at"), found)


@limits_app.command("set")
def limits_set(
    name: Name, amount: Annotated[str, typer.Argument(help="decimal USDC: 5000.00")], actor: Actor = None
) -> None:
    """Set a limit."""
    try:
        value = parse_amount(amount)
    except ValueError as error:
        fail(f"{amount}: {error}", EXIT_USAGE)
    _change(name, value, actor)


@limits_app.command("unset")
def limits_unset(name: Name, actor: Actor = None) -> None:
    """Let the settings' own value hold again."""
    _change(name, None, actor)


def _change(name: str, value: int | None, actor: str | None) -> None:
    known = _known()
    if name not in known:
        fail(f"unknown_limit: {name}; there are {', '.join(known)}", EXIT_USAGE)

    async def change(connection: Connection, who: str, at: datetime) -> bool:
        return await limits.set_limits(connection, {name: value}, at, actor=who) is not None

    did = changed(change, actor)
    holds = f"{format_amount(known[name] if value is None else value)} USDC"
    out.print(f"{name} is {holds}{'' if did else ' already'}")


def _known() -> dict[str, int]:
    from stablerail.limits import known_limits

    return known_limits(needed_settings("database_url", logs=False))
