"""A stand-in for the Hugging Face hub on this machine: repositories that real clients create, fill and read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40
Repositories = dict[str, dict[str, bytes]]  # by name, the contents of files by path


@contextmanager
def local_hub(token: str) -> Iterator[tuple[str, Repositories]]:
    """The address of a hub that accepts one token, and what it holds."""
    repositories: Repositories = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != f"Bearer {token}":
                return self.answer(401, {"error": "Invalid username or password."})
            parts = self.path.split("?")[0].strip("/").split("/")
            name = "/".join(parts[2:4])
            if parts[1:] == ["repos", "create"]:
                asked = json.loads(sent)
                name = f"{asked['organization']}/{asked['name']}"
                repositories.setdefault(name, {})
                return self.answer(200, {"url": f"{address}/{name}", "name": name})
            if parts[1] == "validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if parts[4] == "preupload":  # "lfs" would ask for a further protocol
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(sent)["files"]]
                return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def do_GET(self) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[0] == "api":
                name = "/".join(parts[2:4])
                files = [
                    {"type": "file", "path": path, "rfilename": path, "size": len(content), "oid": COMMIT}
                    for path, content in repositories[name].items()
                ]
                if parts[4:5] == ["tree"]:
                    return self.answer(200, files)
                return self.answer(200, {"id": name, "modelId": name, "sha": COMMIT, "siblings": files})
            content = repositories["/".join(parts[:2])].get("/".join(parts[4:]))
            return self.answer(404, {}) if content is None else self.answer(200, content)

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/octet-stream" if content is body else "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *values: Any) -> None:
            """Print nothing for each request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, repositories
    finally:
        server.shutdown()
        server.server_close()
