"""A PostgreSQL proxy: statements by their SQL, over the simple and the extended protocol (version 3).

The messages of an extended query are kept back until its Execute, Sync or Flush, so of a statement held as a request
the server has seen nothing. A reply is everything up to ReadyForQuery. (That holds back a CopyInResponse too, for
which asyncpg does not wait.) TLS is declined.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict

from tests.support.proxies.base import Link, Proxy, until_either_ends
from tests.support.proxies.hold import Frame, Hold, Match

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104

Due = list[tuple[Hold, Frame]]


def sql_contains(text: str) -> Match:
    """Statements that contain the text, in any case and with any white space."""
    wanted = plain(text).lower()
    return lambda frame: wanted in frame.name.lower()


def commit() -> Match:
    """COMMIT, alone or inside a script."""
    return lambda frame: re.search(r"(?:^|;)\s*COMMIT\b", frame.name, re.IGNORECASE) is not None


def commit_after(*texts: str) -> Match:
    """The COMMIT of a transaction in which, for each text, a statement containing it was executed."""
    is_commit, wanted = commit(), [plain(text).lower() for text in texts]

    def match(frame: Frame) -> bool:
        statements = [sql.lower() for sql in (*frame.before, frame.name)]
        return is_commit(frame) and all(any(text in sql for sql in statements) for text in wanted)

    return match


def plain(sql: str) -> str:
    """SQL without line comments, white space collapsed."""
    return " ".join(re.sub(r"--[^\n]*", "", sql).split())


class Session(Link):
    """What has to be remembered of one connection."""

    def __init__(self, link: Link) -> None:
        super().__init__(link.number, link.reader, link.writer)
        self.writers = link.writers
        self.statements: dict[bytes, str] = {}
        self.portals: dict[bytes, str] = {}
        self.transaction: dict[str, None] | None = None  # its statements so far, each once, in order
        self.readies_due = 1  # ReadyForQuery asked for so far; the first ends the log-in
        self.replies: defaultdict[int, Due] = defaultdict(list)  # by the number of ReadyForQuery before

    def executed(self, kind: str, sql: str, raw: bytes) -> Frame:
        if kind in ("BEGIN", "START"):
            self.transaction = {}
        self.sequence += 1
        frame = Frame(self.number, self.sequence, kind, sql, raw, tuple(self.transaction or ()))
        if kind in ("COMMIT", "END", "ROLLBACK", "ABORT") and " TO " not in f"{sql} ".upper():
            self.transaction = None
        elif self.transaction is not None:
            self.transaction[sql] = None
        return frame


class PostgresProxy(Proxy):
    async def serve(self, link: Link) -> None:
        session = Session(link)
        start = await self._startup(session)
        reader, writer = await session.dial(self.upstream)
        writer.write(start)
        await until_either_ends(self._up(session, writer), self._down(session, reader))

    async def _startup(self, session: Session) -> bytes:
        while True:
            head = await session.reader.readexactly(8)
            length, code = int.from_bytes(head[:4]), int.from_bytes(head[4:])
            if code not in (SSL_REQUEST, GSS_REQUEST):
                return head + await session.reader.readexactly(length - 8)
            session.writer.write(b"N")

    async def _up(self, session: Session, server: asyncio.StreamWriter) -> None:
        kept = b""
        while True:
            kind, raw = await read_message(session.reader)
            kept += raw
            body = raw[5:]
            match kind:
                case b"P":
                    name, sql, _ = body.split(b"\0", 2)
                    session.statements[name] = plain(sql.decode())
                    continue
                case b"B":
                    portal, name, _ = body.split(b"\0", 2)
                    session.portals[portal] = session.statements.get(name, "")
                    continue
                case b"D" | b"C":
                    continue
                case b"Q":
                    await self._statement(session, plain(body[:-1].decode()), kept, server)
                case b"E":
                    await self._statement(session, session.portals.get(body.split(b"\0", 1)[0], ""), kept, server)
                case _:
                    server.write(kept)
            if kind in (b"Q", b"S", b"F"):
                session.readies_due += 1
            kept = b""
            await server.drain()

    async def _statement(self, session: Session, sql: str, raw: bytes, server: asyncio.StreamWriter) -> None:
        word = re.match(r"\w*", sql)
        frame = session.executed(word[0].upper() if word else "", sql, raw)
        requests, replies = self.note(frame)
        if replies:
            session.replies[session.readies_due] += [(hold, frame) for hold in replies]
        async with Hold.passing(requests, frame, session.writer):
            server.write(raw)

    async def _down(self, session: Session, server: asyncio.StreamReader) -> None:
        readies, kept = 0, b""
        while True:
            kind, raw = await read_message(server)
            if readies not in session.replies:
                session.writer.write(raw)
            else:
                kept += raw
                if kind == b"Z":
                    due = session.replies.pop(readies)
                    async with Hold.passing([hold for hold, _ in due], due[0][1], session.writer):
                        session.writer.write(kept)
                    kept = b""
            readies += kind == b"Z"
            await session.writer.drain()


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The type byte, and the whole message with it."""
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(int.from_bytes(head[1:]) - 4)
