"""The commit record: every row a commit wrote and every message it wants to emit, as bytes.

    zstd( msgpack [ version, stage, topic, at, content, proof ] )
        content = msgpack [ blocks, messages ]      what the digest covers
        proof   = blocks of audit and owners        made from the digest: the hash chain

Columns are kept as the write statement takes them, so a rebuild is the same statement again. Compressed here, not by
PostgreSQL: the journal gets the same bytes, and zstd halves them at a tenth of a millisecond per 500 events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgpack
import zstandard

from ledger.errors import JournalBroken, RecordTooLarge
from ledger.rows import Block, Op
from ledger.tables import BY_NAME
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
    try:
        if zstandard.frame_content_size(record) > BYTES_MAX:  # max_output_size binds only where the frame does not say
            raise JournalBroken(f"a commit record of more than {BYTES_MAX} bytes")
        version, *rest = msgpack.unpackb(_decompressor.decompress(record, max_output_size=BYTES_MAX))
        if version != VERSION:
            raise JournalBroken(f"a commit record of version {version}; this program reads {VERSION}")
        stage, topic, at, content, proof = rest
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
    except JournalBroken:
        raise
    except (zstandard.ZstdError, msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
        raise JournalBroken(f"not a commit record: {error}") from error


def _plain(blocks: Sequence[Block]) -> list[Any]:
    return [[b.table.name, b.op.value, b.columns] for b in blocks]


def _block(plain: list[Any]) -> Block:
    name, op, columns = plain
    table = BY_NAME[name]
    if op != Op.DELETE:  # a program of before its newest columns wrote nothing into them
        columns += ["-"] * (len(table.written(Op(op))) - len(columns))
    return Block(table, Op(op), columns)
