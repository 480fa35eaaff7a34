"""`stablerail maintain`: forget now what a worker of `recovery` forgets once a day."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from stablerail.cli_base import Actor, actor_of, check_own, needed_settings, out, run, show_table
from stablerail.cli_verify import shown_progress


def maintain(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how many rows may go")] = False,
    actor: Actor = None,
) -> None:
    """Forget rows that nothing can ask for any more: what an event of long ago left in the inbox, calls that have ended.

    A worker of `recovery` does so once a day. It may be cut off, and run beside a worker that is at it.
    """
    from agents.crash import Stop
    from agents.recovery.maintain import Maintain
    from stablerail.metrics import Metrics
    from stablerail.wiring import broker_retentions, services

    settings = needed_settings("database_url", logs=False)

    async def work() -> dict[str, int]:
        shared = services(settings, Metrics(), Stop(ends=False))
        margin = timedelta(days=settings.retention_margin_days)
        with shown_progress() as progress:
            total = 0

            def counted(table: str, rows: int) -> None:
                nonlocal total
                total += rows
                progress(f"forgetting: {total:,} rows, now of {table}", 0, 0)

            job = Maintain(shared, settings.topic_prefix, margin, broker_retentions(settings), counted)
            connection = await shared.connect()
            try:
                if dry_run:
                    return await job.would(connection)
                await check_own(settings, connection)
                await shared.emitter.start()
                return await job.run(connection, actor_of(settings, actor))
            finally:
                await shared.relay.close()
                await shared.emitter.stop()
                await connection.close()

    found = run(work)
    show_table(("rows", "table"), ((f"{rows:,}", name) for name, rows in found.items()))
    out.print("would be forgotten" if dry_run else "forgotten")
