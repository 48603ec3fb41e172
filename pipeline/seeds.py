"""Seeds derived from coordinates such as (seed, step), so that every random number is reproducible on its own."""

from __future__ import annotations

import hashlib


def coordinate_seed(*coordinates: int | str) -> int:
    """Hash coordinates such as ("train", seed, step) to a 63-bit seed: unlike sums, neighbours are independent."""
    return int.from_bytes(hashlib.sha256(repr(coordinates).encode()).digest()[:8], "big") >> 1
