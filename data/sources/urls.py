"""Checks URLs: only a few protocols are read, and no URL with a secret in it."""

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
)  # fsspec has more; some of them run programs or reveal data
# A secret key may have slashes before its @, so a colon is enough, unless a port number follows.
_LOGIN = re.compile(r"://[^/]*(@|:(?!\d*(/|$)))")
_SECRET = re.compile(
    r"[?&;][^=&;]*(sig|token|key|secret|password|credential|auth|x-amz-|x-goog-)[^=&;]*=", re.IGNORECASE
)


def check_url(url: str) -> str:
    """Return the same path, name or URL (or several, chained by ::).

    ValueError if a protocol is not supported, or, without quoting the URL, if it has credentials: it would be printed,
    and stored in the manifest, in config.yaml and by trackers.
    """
    parts = url.split("::")
    if any(_LOGIN.search(part) or _SECRET.search(part) for part in parts):
        raise ValueError("a URL with credentials would end up in logs and manifests: set them in the environment")
    for number, part in enumerate(parts, 1):
        protocol, separator, _ = part.partition("://")
        if (separator or number < len(parts)) and protocol not in PROTOCOLS:
            raise ValueError(
                f"{protocol}:// is not supported: use a path, or {', '.join(f'{p}://' for p in PROTOCOLS[:-1])}"
            )
    return url
