"""The commit record: every row a commit wrote and every message it wants to emit, as bytes.

    zstd( msgpack [ version, stage, topic, at, content, proof ] )
        content = msgpack [ blocks, messages ]      what the digest covers
        proof   = blocks of audit and owners        made from the digest: the hash chain

Columns are kept as the write statement takes them, so a rebuild is the same statement again. Compressed here, not by
PostgreSQL: the journal gets the same bytes, and zstd halves them at a tenth of a millisecond per 500 events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgpack
import zstandard

from ledger.errors import JournalBroken, RecordTooLarge
from ledger.rows import Block, Op
from ledger.tables import AUDIT, BY_NAME, OWNERS
from topics.envelope import Headers, headers_of

VERSION: Final = 1
BYTES_MAX: Final = 256 * 1024 * 1024
"""What a record may unpack to: a bound for readers, far above what 2,000 events of limited size can cause. None is made over it."""

# a wider window than level 1's own: ids and hashes repeat from column to column, half a megabyte apart
_compressor = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters.from_level(1, window_log=22, hash_log=18)
)
_decompressor = zstandard.ZstdDecompressor()


class Message(NamedTuple):
    """A message to emit. `headers` replaces the envelope of the other fields where it is given (dead letters, repeats)."""

    topic: str
    """Without prefix."""
    key: bytes | None
    value: bytes | None
    id: str = ""
    type: str = ""
    traceparent: str | None = None
    headers: Headers | None = None

    def kafka_headers(self, source: str, at: datetime) -> Headers:
        if self.headers is not None:
            return [(name, value) for name, value in self.headers]
        return headers_of(self.type, event_id=self.id, source=source, time=at, traceparent=self.traceparent)


@dataclass(frozen=True, slots=True)
class CommitRecord:
    stage: str
    topic: str
    at: datetime
    blocks: list[Block]
    messages: list[Message]
    digest: bytes
    proof: list[Block]


class Told(NamedTuple):
    """What a record has to tell, and nothing of the rows that it wrote."""

    stage: str
    at: datetime
    messages: list[Message]


class Proof(NamedTuple):
    """What a record says of its place in the chains, and nothing of the other rows that it wrote."""

    at: datetime
    digest: bytes
    proof: list[Block]
    """Of audit and owners."""


def pack_content(blocks: Sequence[Block], messages: Sequence[Message]) -> tuple[bytes, bytes]:
    """-> content, its SHA-256."""
    content: bytes = msgpack.packb([_plain(blocks), messages])
    return content, hashlib.sha256(content).digest()


def pack(stage: str, topic: str, at: datetime, content: bytes, proof: Sequence[Block]) -> bytes:
    """Raises RecordTooLarge where `unpack` would refuse it: what compresses well may be small and yet too much to read."""
    plain: bytes = msgpack.packb([VERSION, stage, topic, at.isoformat(), content, _plain(proof)])
    if len(plain) > BYTES_MAX:
        raise RecordTooLarge(f"{len(plain)} bytes unpacked; at most {BYTES_MAX}")
    return _compressor.compress(plain)


def unpack(record: bytes) -> CommitRecord:
    """Raises JournalBroken for anything that `pack` of this version did not make."""
    with _reading():
        stage, topic, at, content, proof = _opened(record)
        blocks, messages = msgpack.unpackb(content)
        return CommitRecord(
            stage=stage,
            topic=topic,
            at=datetime.fromisoformat(at),
            blocks=[_block(b) for b in blocks],
            messages=[Message(*m) for m in messages],
            digest=hashlib.sha256(content).digest(),
            proof=[_block(b) for b in proof],
        )


def told_of(record: bytes) -> Told:
    """Also of a record of a newer program, whose tables this one does not know: it must be told all the same. Raises JournalBroken."""
    with _reading():
        stage, _, at, content, _ = _opened(record)
        _, messages = msgpack.unpackb(content)
        return Told(stage, datetime.fromisoformat(at), [Message(*m) for m in messages])


def proof_of(record: bytes) -> Proof:
    """Also of a record of a newer program, whose other tables and newest columns this one does not know. Raises JournalBroken."""
    with _reading():
        _, _, at, content, proof = _opened(record)
        known = [_block(b) for b in proof if b[0] in (AUDIT.name, OWNERS.name)]
        for one in known:
            del one.columns[len(one.table.written(one.op)) :]
        return Proof(datetime.fromisoformat(at), hashlib.sha256(content).digest(), known)


@contextmanager
def _reading() -> Iterator[None]:
    """What is not as `pack` makes it is JournalBroken."""
    try:
        yield
    except (zstandard.ZstdError, msgpack.UnpackException, ValueError, TypeError, KeyError, IndexError) as error:
        raise JournalBroken(f"not a commit record: {error}") from error


def _opened(record: bytes) -> list[Any]:
    """Stage, topic, time, content, proof."""
    if zstandard.frame_content_size(record) > BYTES_MAX:  # max_output_size binds only where the frame does not say
        raise JournalBroken(f"a commit record of more than {BYTES_MAX} bytes")
    rest: list[Any]
    version, *rest = msgpack.unpackb(_decompressor.decompress(record, max_output_size=BYTES_MAX))
    if version != VERSION:
        raise JournalBroken(f"a commit record of version {version}; this program reads {VERSION}")
    return rest


def _plain(blocks: Sequence[Block]) -> list[Any]:
    return [[b.table.name, b.op.value, b.columns] for b in blocks]


def _block(plain: list[Any]) -> Block:
    name, op, columns = plain
    return Block(BY_NAME[name], Op(op), [*columns])
