"""Seeds: every draw has its own, so that drawing more for one purpose shifts no other."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, purpose: str) -> int:
    """A run's seed for one purpose, such as "weights" or "listeners"."""
    return seed_from(f"{seed}/{purpose}")


def derived_seed(word: str, *numbers: int) -> int:
    """The seed of one of many similar draws: `derived_seed("shuffle", seed, block)`."""
    return seed_from(" ".join(["saekit", word, *map(str, numbers)]))


def seed_from(text: str) -> int:
    """63 bits of the SHA-256 of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
