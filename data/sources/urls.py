"""Which URLs are read: those of a few protocols, and none with a secret in it."""

from __future__ import annotations

import re

PROTOCOLS = (
    "file",
    "zip",
    "s3",
    "gs",
    "hf",
    "http",
    "https",
    "memory",
)  # of fsspec's many, some of which run or reveal
# A secret key may hold slashes before its @, so a colon says enough; but a port is a number.
_LOGIN = re.compile(r"://[^/]*(@|:(?!\d*(/|$)))")
_SECRET = re.compile(
    r"[?&;][^=&;]*(sig|token|key|secret|password|credential|auth|x-amz-|x-goog-)[^=&;]*=", re.IGNORECASE
)


def check_url(url: str) -> str:
    """The same path, name or URL (or several, chained by ::).

    ValueError, which does not hold the URL, where it has credentials: it would be printed, and kept in the manifest, in
    config.yaml and by trackers. And for protocols that are not read.
    """
    parts = url.split("::")
    if any(_LOGIN.search(part) or _SECRET.search(part) for part in parts):
        raise ValueError("a URL with credentials would end up in logs and manifests: give these by the environment")
    for number, part in enumerate(parts, 1):
        protocol, separator, _ = part.partition("://")
        if (separator or number < len(parts)) and protocol not in PROTOCOLS:
            raise ValueError(
                f"{protocol}:// is not read: use a path, or {', '.join(f'{p}://' for p in PROTOCOLS[:-1])}"
            )
    return url
