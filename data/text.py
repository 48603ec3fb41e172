"""Formats text for display and for hashes: printable names, counts, sizes, times, digests of lines."""

from __future__ import annotations

import hashlib
import reprlib
import unicodedata
from collections.abc import Iterable

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp")  # categories of Unicode: control, format, ends of lines and paragraphs
_JOINERS = "\u200c\u200d"  # format characters that are part of words, and of emoji


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines of text."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return sha.hexdigest()


def printable(name: str) -> str:
    """Make an untrusted name or message safe for a line of a terminal or log: backslash escapes replace bytes that are
    not UTF-8, which JSON cannot hold, and all that would end the line, move the cursor or reverse the text."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _INVISIBLE and c not in _JOINERS else c for c in text)


def counted(number: int, noun: str) -> str:
    """Format a number of things: `1 image`, `1,024 images`, `2 classes`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def human_bytes(count: int) -> str:
    """Format a number of bytes: `512 bytes`, `1.5 kB`, `20.0 MB`, `3.1 GB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} byte{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a time: `12 s`, `7 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def brief(value: object) -> str:
    """Shorten a value for an error message: a list may be long, and a few YAML aliases may expand to gigabytes."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 100, 80
