"""One movement as a Faust app in this process.

Faust brings the group, the rebalance, the batched consumer, the web; the stages bring the rules. SIGTERM: no new runs are
taken, what is in flight is journaled, emitted and acknowledged, then the process ends. Anything unexpected ends it at
once (agents/crash.py), and the supervisor starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import faust
import structlog
import uvloop
from aiokafka.errors import KafkaError
from mode import CrashingSupervisor
from opentelemetry import trace

from agents.crash import EXIT_BUG, Stop, Watchdog, exit_now
from agents.delivery import Delivery
from agents.intake import Delivered
from agents.looking import until_up
from agents.services import Services
from agents.sweeper import Sweeper
from agents.transport import ack, batched_topic, register
from chain.errors import KeyUnavailable
from chain.evidence import QUORUM
from ledger.commit import TRANSIENT, lost_not_cancelled
from ledger.errors import ACopy, DatabaseBehind, LegacyUnusable, RoleRefused
from stablerail import shadow
from stablerail.config import EXIT_CONFIG, ConfigError, Problem, Settings
from stablerail.connections import opener
from stablerail.metrics import Metrics
from stablerail.movements import NEEDS
from stablerail.supervisor import ends_with
from stablerail.telemetry import exported
from stablerail.views import View, mount
from stablerail.wiring import Movement, build, services
from stablerail.workers import tell, watch_jobs
from topics.catalog import Topic

_log = structlog.get_logger()

FAUST_STOP_S = 8.0
"""For Faust to leave its group and commit once our part is done."""
POLL_S_MAX = 10 * 365 * 86_400.0
"""Between two polls of the broker: no limit."""


def run_worker(movement: str, settings: Settings, port: int, supervisor: int | None = None) -> NoReturn:
    """Runs until SIGTERM or the end of `supervisor`, its process (exit code 0), wrong settings (EXIT_CONFIG), or a crash (EXIT_BUG),
    and ends the process."""
    settings.require(*NEEDS[movement])
    structlog.contextvars.bind_contextvars(movement=movement)  # several may write into one log
    # until Faust listens nothing is in hand; the first process of a container ends by no signal that it does not handle
    signal.signal(signal.SIGTERM, lambda *_: exit_now(0))
    # a batch makes tens of thousands of objects that die with it; looking at the living every 700 costs a third of the time
    gc.set_threshold(100_000, 50, 100)
    try:
        uvloop.run(_Worker(movement, settings, port, supervisor).run())
    except (
        ACopy,
        ConfigError,
        DatabaseBehind,
        KeyUnavailable,
        LegacyUnusable,
        RoleRefused,
    ) as error:  # nothing was done
        _log.critical("worker.stops", movement=movement, code=error.code, reason=str(error))
        exit_now(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_BUG)
    except Exception:  # a database that does not let us in, a disk that is full
        _log.critical("worker.crashed", movement=movement, exc_info=True)
        exit_now(EXIT_BUG)


class _FaustWorker(faust.Worker):
    """Faust stops its consumer at once on SIGTERM; what is in flight has to be acknowledged through it first."""

    finish: Callable[[], Awaitable[None]]

    async def _stop_on_signal(self, signal: Any) -> None:
        await self.finish()
        await super()._stop_on_signal(signal)


class _Worker:
    def __init__(self, movement: str, settings: Settings, port: int, supervisor: int | None) -> None:
        self._name = movement
        self._settings = settings
        self._port = port
        self._metrics = Metrics()
        self._spans = exported(settings.otlp_traces_url, f"stablerail-{movement}")
        if self._spans is not None:
            trace.set_tracer_provider(self._spans.others)
        self._supervisor = supervisor
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> NoReturn:
        settings = self._settings
        if self._supervisor is not None:
            self._tasks.append(asyncio.create_task(ends_with(self._supervisor)))
        shared = services(settings, self._metrics, Stop(), self._spans)
        await until_up(partial(_reach, shared), "worker.waits", (KafkaError, *TRANSIENT))
        await _beside(settings)
        movement = await build(self._name, settings, shared, self._metrics)
        app = faust_app(self._name, settings, self._port)
        view = View(self._name, app, movement, shared, self._metrics, settings.worker_unassigned_timeout_s)
        for delivery in movement.deliveries:
            attach(app, delivery, settings.topic_prefix)
        for part in movement.mounts:
            part(app)
        app.producer_only = not (movement.deliveries or movement.mounts)  # a consumer without topics does not start
        mount(app, view)
        worker = _FaustWorker(app, loop=asyncio.get_running_loop(), override_logging=False, quiet=True)
        worker.spinner = None
        worker.finish = partial(self._finish, view, movement, app)
        watchdog = Watchdog(settings.worker_stalled_s_max)
        view.beat = watchdog.beat
        watchdog.start()
        loops: list[Callable[[], Awaitable[None]]] = [d.work for d in movement.deliveries]
        loops += [*movement.workers, Sweeper(shared).work, view.measure]
        if self._name == "onboarding":
            loops.append(partial(watch_jobs, shared.connect, shared.clock, self._metrics))
        loops.append(partial(tell, shared.connect, self._name, self._metrics.registry, view.unready))
        for loop in loops:
            self._tasks.append(asyncio.create_task(_forever(loop, shared)))
        _log.info("worker.starts", movement=self._name, port=self._port)
        if self._name == "deposits":
            for chain in (chain for chain in settings.read_chains if len(settings.rpc_urls[chain]) < QUORUM):
                _log.warning("chain.one_endpoint", chain=chain, means="finality and reversals rest on one node's word")
        failure: Exception | None = None
        try:
            await worker.start()
        except Exception as error:
            failure = error
        finally:
            await self._stop(worker, movement, shared, failure)

    async def _finish(self, view: View, movement: Movement, app: Any) -> None:
        """Finishes what is in flight, within the limit; what is left is delivered again to the next owner."""
        view.stopping = True
        limit_s = self._settings.worker_shutdown_timeout_s
        loop = asyncio.get_running_loop()
        loop.call_later(limit_s, exit_now, EXIT_BUG)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s * 0.8):
                for delivery in movement.deliveries:
                    await delivery.drained()
                if movement.deliveries:
                    await app.consumer.commit()  # what is acknowledged; Faust's timer may come too late
                # nothing is left to lose; Faust's own stop now and then hangs, and must not keep the partitions
                loop.call_later(FAUST_STOP_S, exit_now, 0)

    async def _stop(self, worker: Any, movement: Movement, shared: Services, failure: Exception | None) -> NoReturn:
        if isinstance(failure, OSError) and failure.errno == errno.EADDRINUSE:
            _log.critical("worker.port_taken", movement=self._name, port=self._port, remedy="another port: --port")
            exit_now(EXIT_BUG)
        if reason := worker.crash_reason or failure:
            _log.critical("worker.crashed", movement=self._name, exc_info=reason)
            exit_now(EXIT_BUG)
        await worker.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await shared.relay.close()
                await shared.emitter.stop()
                for close in movement.closing:
                    await close()
                if self._spans is not None:
                    await asyncio.to_thread(self._spans.close)
        _log.info("worker.stopped", movement=self._name)
        exit_now(0)  # all is done; a thread of Faust's that did not notice would keep the process


def faust_app(movement: str, settings: Settings, port: int) -> Any:
    """The Faust app of a movement, configured so that it loses nothing (docs/adr). Raises ConfigError."""
    register()
    logging.getLogger("agents.transport").setLevel(logging.WARNING)  # Faust says its service's comings and goings there
    # the end of an agent at SIGTERM is an error to Faust; a real one ends the worker, which says so itself
    logging.getLogger("faust.agents.actor").setLevel(logging.CRITICAL)
    broker = settings.kafka_bootstrap.replace(",", ";")
    datadir = Path(settings.datadir) / "faust"
    try:
        datadir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.EDQUOT, errno.EIO, errno.ENOSPC):  # it passes, and no setting is wrong
            raise
        raise ConfigError((Problem("STABLERAIL_DATADIR", f"must be writable: {error.strerror}"),)) from None
    app: Any = faust.App(
        f"{settings.group_prefix}{settings.topic_prefix}{movement}",
        broker=f"kafka://{broker}",
        broker_consumer=f"batched://{broker}",
        broker_producer=f"kafka://{broker}",
        broker_session_timeout=settings.kafka_session_timeout_s,
        broker_heartbeat_interval=settings.kafka_session_timeout_s / 6,
        broker_commit_interval=0.5,
        # aiokafka leaves the group after so long without a poll, and joins again at the next one, which Faust makes only once it
        # has joined. Our stages wait for a database for as long as it is away; a loop that stands still is the watchdog's.
        broker_max_poll_interval=POLL_S_MAX,
        consumer_auto_offset_reset="earliest",
        agent_supervisor=CrashingSupervisor,
        stream_wait_empty=False,
        stream_buffer_maxsize=16,
        worker_redirect_stdouts=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        store="memory://",
        datadir=str(datadir / f"{movement}-{port}"),
        web_enabled=True,
        web_bind=settings.worker_bind,
        web_port=port,
        web_host=settings.worker_bind,
        # they answer without authentication
        web_router_enabled=False,
        web_tables_enabled=False,
    )
    return app


def attach(app: Any, delivery: Delivery, prefix: str) -> None:
    """Makes the stage an agent of the app, and tells it which partitions it has."""
    source: Topic = delivery.stage.source
    name = source.named(prefix)

    async def agent(stream: Any) -> None:
        async for event in stream.noack().events():
            await delivery.offer(Delivered(event.value, partial(ack, app, event)))

    async def assigned(sender: Any, **_: Any) -> None:
        held = {(tp.topic, tp.partition) for tp in sender.consumer.assignment() if tp.topic == name}
        delivery.assigned(held)

    async def revoked(_sender: Any, revoked: Any, **_: Any) -> None:
        delivery.revoked({(tp.topic, tp.partition) for tp in revoked if tp.topic == name})

    app.agent(batched_topic(app, name), name=delivery.stage.name)(agent)
    app.on_rebalance_complete.connect(assigned, weak=False)
    app.on_partitions_revoked.connect(revoked, weak=False)


async def _forever(loop: Callable[[], Awaitable[None]], shared: Services) -> None:
    try:
        with lost_not_cancelled():
            await loop()
        shared.stop(f"{loop}: ended")
    except Exception as error:
        shared.stop(f"{loop}: {error!r}", error)


async def _beside(settings: Settings) -> None:
    """Raises LegacyUnusable."""
    if settings.legacy is None:
        return
    connection = await opener(settings, None)()
    try:
        await shadow.start(settings, connection)
    finally:
        await connection.close()


async def _reach(shared: Services) -> None:
    """Kafka and PostgreSQL. Raises ACopy and DatabaseBehind."""
    try:
        await shared.emitter.start()
        connection = await shared.connect()
        await connection.close()
        await shared.relay.check()
    except BaseException:
        await shared.emitter.stop()
        raise
