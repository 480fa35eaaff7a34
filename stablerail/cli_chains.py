"""`stablerail chains rescan`: a chain is read again, from a block that a person names."""

from __future__ import annotations

from typing import Annotated

import typer

from stablerail.cli_base import Actor, changed, out
from stablerail.cli_deposits import Reason
from topics.events import Chain

chains_app = typer.Typer(no_args_is_help=True, help="The chains that are read by ourselves.")


@chains_app.command("rescan")
def rescan(
    chain: Annotated[Chain, typer.Argument(help="the chain", case_sensitive=False)],
    block: Annotated[int, typer.Argument(help="the first block", min=0, max=2**63 - 1)],
    reason: Reason,
    actor: Actor = None,
) -> None:
    """Read a chain from BLOCK on again, not below its scan's start. What is known stays as it is; what was missed is credited."""
    from agents.chains.watch_chain import ask_rescan

    changed(lambda connection, who, at: ask_rescan(connection, chain, block, reason, who, at), actor)
    out.print(f"the worker of chains reads {chain} again, from block {block} on")


@chains_app.callback()
def _chains() -> None:
    """Keeps `rescan` a command of the group while it is the only one."""
