"""Content hashes: the identity of steps, candidates and files. Pure, but for reading files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HASH_LENGTH = 16  # hex digits; 64 bits, far beyond the number of steps of any run


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; equal values give equal text. Refuses NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:HASH_LENGTH]


def hash_of_items(items: Iterable[Any]) -> str:
    """`content_hash` of the list of the items, which need not be in memory together."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update((b"," if number else b"") + canonical_json(item).encode())
    digest.update(b"]")
    return digest.hexdigest()[:HASH_LENGTH]


def file_sha256(path: str | Path) -> str:
    """Full sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def derive_seed(*parts: Any) -> int:
    """A 31-bit seed that follows from `parts`; the same on every machine."""
    return int(hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()[:8], 16) & 0x7FFFFFFF
