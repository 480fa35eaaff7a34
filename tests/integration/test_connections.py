"""What every connection of ours to PostgreSQL has, whatever the server's own settings are."""

from __future__ import annotations

import socket

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
