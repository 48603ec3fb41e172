"""Seeds from coordinates: every random number of the project is a function of what it is for."""

from __future__ import annotations

import hashlib


def coordinate_seed(*coordinates: int | str) -> int:
    """63 bits from coordinates such as (seed, step): neighbouring seeds share nothing, as they would if added."""
    return int.from_bytes(hashlib.sha256(repr(coordinates).encode()).digest()[:8], "big") >> 1
