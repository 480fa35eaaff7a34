"""What every connection of ours to PostgreSQL has, whatever the server's own settings are."""

from __future__ import annotations

import socket

import pytest

from stablerail.config import ConfigError, load_settings
from stablerail.connections import connector
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to

databases, dsn = ledger_rig.databases, ledger_rig.dsn


async def test_a_host_that_is_gone_is_noticed_by_both_sides(dsn: str) -> None:
    """A vanished worker's session has the locks of who leads; who waits for a vanished server would wait for ever."""
    connection = await connect_to(dsn)()
    shown = [await connection.fetchval(f"SHOW tcp_keepalives_{name}") for name in ("idle", "interval", "count")]
    assert shown == ["10", "5", "3"]
    line = connection._transport.get_extra_info("socket")  # type: ignore[attr-defined]
    assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000
    await connection.close()


async def test_a_url_that_the_driver_does_not_read_is_a_wrong_setting() -> None:
    """Not a database that is away, which would be waited for without end."""
    url = "postgresql://rail:s3cr3t@db/rail?sslmode=s3cr3t"
    with pytest.raises(ConfigError, match="STABLERAIL_DATABASE_URL") as refused:
        await connector(load_settings(env_file=None, database_url=url))()
    assert "s3cr3t" not in str(refused.value)
