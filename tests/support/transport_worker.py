"""A worker process on the batched transport, for tests/integration/test_transport_*.py.

`python -m tests.support.transport_worker '{"bootstrap": ..., "topic": ..., "journal": ...}'`. It appends to the journal file

    A <pid> <partition> ...               what it is assigned now
    R <pid> <partition> <offset> <value>  a record it processed
    L <pid> <milliseconds>                time from produce to here, when "latency" is set
    G <pid> <seconds>                     so long nothing came, after what came before: GAP_S or more

and acknowledges a run after writing it. With "bug" set, a record of that value raises. Exit code 0 after SIGTERM, 70 after
a crash.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faust
import uvloop
from mode import CrashingSupervisor

from agents.transport import Run, ack, batched_topic, register

EXIT_CRASHED = 70
FAUST_STOP_S = 8.0
GAP_S = 0.9


@dataclass(frozen=True)
class Job:
    bootstrap: str
    topic: str
    journal: str
    bug: str = ""
    delay_s: float = 0.0
    latency: bool = False
    table: bool = False
    buffer: int = 16
    session_s: int = 3
    """How long its heart may be silent before another takes over."""


def build(job: Job, datadir: str) -> faust.App:
    register()
    broker = job.bootstrap.replace(",", ";")
    app = faust.App(
        job.topic,
        broker=f"kafka://{broker}",
        broker_consumer=f"batched://{broker}",
        broker_producer=f"kafka://{broker}",
        broker_session_timeout=job.session_s,
        broker_heartbeat_interval=0.5,
        broker_commit_interval=0.5,
        agent_supervisor=CrashingSupervisor,
        stream_wait_empty=False,
        stream_buffer_maxsize=job.buffer,
        worker_redirect_stdouts=False,
        topic_disable_leader=True,
        topic_replication_factor=1,
        topic_partitions=4,
        web_enabled=False,
        store="memory://",
        datadir=datadir,
    )
    journal = os.open(job.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    pid = os.getpid()
    table = app.Table(f"{job.topic}-seen", default=int, partitions=4) if job.table else None

    async def stage(stream: Any) -> None:
        last_s = time.monotonic()
        async for event in stream.noack().events():
            run: Run = event.value
            gap_s = time.monotonic() - last_s
            if gap_s >= GAP_S:
                os.write(journal, f"G {pid} {gap_s:.1f}\n".encode())
            if job.bug and any(record.value == job.bug.encode() for record in run.records):
                raise RuntimeError(f"a bug in the stage meets {job.bug}")
            await asyncio.sleep(job.delay_s)
            if table is not None:
                table[str(run.partition)] = run.last_offset
            if job.latency:
                lines = [f"L {pid} {time.time() * 1e3 - float(record.value or 0):.3f}" for record in run.records]
            else:
                lines = [f"R {pid} {run.partition} {r.offset} {(r.value or b'').decode()}" for r in run.records]
            os.write(journal, ("\n".join(lines) + "\n").encode())
            ack(app, event)
            last_s = time.monotonic()

    async def assigned(app: faust.App, **_: Any) -> None:
        partitions = sorted(tp.partition for tp in app.consumer.assignment() if tp.topic == job.topic)
        os.write(journal, f"A {pid} {' '.join(map(str, partitions))}\n".encode())

    app.agent(batched_topic(app, job.topic))(stage)
    app.on_rebalance_complete.connect(assigned, weak=False)
    return app


class Worker(faust.Worker):
    """Faust's own stop hangs now and then, with nothing in hand; the product's worker does not wait for it either."""

    async def _stop_on_signal(self, signal: Any) -> None:
        asyncio.get_running_loop().call_later(FAUST_STOP_S, os._exit, 0)
        await super()._stop_on_signal(signal)


async def run(app: faust.App) -> int:
    """The worker in our own loop: our logging, our stdout, its signal handlers (SIGTERM stops it)."""
    worker = Worker(app, loop=asyncio.get_running_loop(), override_logging=False, quiet=True)
    worker.spinner = None
    try:
        await worker.start()
    finally:
        await worker.stop()
    return EXIT_CRASHED if worker.crash_reason else 0


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("LOG", "WARNING"), format="%(asctime)s %(process)d %(name)s %(message)s")
    with tempfile.TemporaryDirectory() as data:
        code = uvloop.run(run(build(Job(**json.loads(sys.argv[1])), data)))
    sys.exit(code)
