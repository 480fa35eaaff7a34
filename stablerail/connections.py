"""What a process talks to: its database, the relay to the journal, and the endpoints of chains."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import asyncpg
from aiokafka.errors import KafkaError

from agents.journal_end import last_records
from chain.rpc import Rpc
from ledger.commit import lost_not_cancelled
from ledger.errors import RoleRefused
from ledger.journal import Publish, Relay
from ledger.rows import Connection
from ledger.shadow import Mirror, mirrored
from stablerail.config import ConfigError, Problem, Settings
from stablerail.shadow import mirror_for
from topics.events import Chain


def connector(settings: Settings, **server_settings: str) -> Callable[[], Awaitable[Connection]]:
    """As `opener`; what its connections post goes to the legacy table too, where there is one."""
    return opener(settings, mirror_for(settings), **server_settings)


def opener(settings: Settings, mirror: Mirror | None, **server_settings: str) -> Callable[[], Awaitable[Connection]]:
    """Opens a connection in our schema and under our role, whose locks a frozen process cannot keep. It raises RoleRefused,
    and asyncpg's errors."""

    async def connect() -> Connection:
        try:
            # here, once: whoever opens one and waits for a server that is away sees an error
            with lost_not_cancelled():
                return await _open()
        except (asyncpg.ClientConfigurationError, UnicodeError, OverflowError):
            # not with the driver's text, which may hold what it took for the host
            raise ConfigError(
                (Problem("STABLERAIL_DATABASE_URL", "must be a URL that PostgreSQL's clients read"),)
            ) from None
        except (asyncpg.InvalidParameterValueError, asyncpg.InsufficientPrivilegeError) as error:
            role = settings.database_role
            remedy = f"run `stablerail migrate` as the owner; a login of its own needs: GRANT {role} TO the login"
            raise RoleRefused(f"{error}; {remedy}") from None

    async def _open() -> Connection:
        connection: Connection = await asyncpg.connect(
            settings.secret("database_url"),
            timeout=10,
            connection_class=mirrored(mirror),
            server_settings={
                "application_name": "stablerail",
                "search_path": settings.database_schema,
                "role": settings.database_role,
                "lock_timeout": f"{int(settings.database_lock_timeout_s * 1000)}ms",
                "idle_in_transaction_session_timeout": f"{int(settings.database_idle_timeout_s * 1000)}ms",
                # a host that is gone is noticed within half a minute: its session has the locks of whoever leads
                "tcp_keepalives_idle": "10",
                "tcp_keepalives_interval": "5",
                "tcp_keepalives_count": "3",
                # whatever the database's own is: who waited for a lock must see what was done meanwhile
                "default_transaction_isolation": "read committed",
                "jit": "off",  # our statements are short; compiling them costs more than running them
                # a custom plan would parse every array literal once more, only to plan the same
                "plan_cache_mode": "force_generic_plan",
                **server_settings,
            },
        )
        _keep_alive(connection)
        return connection

    return connect


def _keep_alive(connection: Any) -> None:
    """A server whose host is gone is noticed within half a minute, also by who waits for its answer: else for ever."""
    line = connection._transport.get_extra_info("socket")
    if line is None or line.family == socket.AF_UNIX:
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def relay_of(settings: Settings, publish: Publish) -> Relay:
    """The relay of a process. With each connection it looks first whether the database is the one that the journal is of."""
    last = partial(last_records, settings.kafka_bootstrap, settings.topic_prefix)
    return Relay(connector(settings, synchronous_commit="off"), publish, (KafkaError,), last)


def rpcs(settings: Settings, chain: Chain) -> tuple[Rpc, ...]:
    """The endpoints of a chain that we read."""
    return tuple(
        Rpc(url.get_secret_value(), settings.chain_ids[chain], settings.rpc_timeout_s)
        for url in settings.rpc_urls[chain]
    )
