"""Which partition a key belongs to: Kafka's default partitioner, remembered (aiokafka's murmur2 is pure Python)."""

from __future__ import annotations

from functools import lru_cache

from aiokafka.partitioner import murmur2


@lru_cache(maxsize=200_000)
def partition_of(key: bytes | None, count: int) -> int:
    """0 … count − 1; a message without a key goes to partition 0."""
    return (int(murmur2(key)) & 0x7FFFFFFF) % count if key is not None else 0
