"""A small stand-in for the Hugging Face hub on the loopback interface: one model, and any trouble that is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) as the model `hub_id`. `trouble` is a status, "hang" or None."""

    daemon_threads = True

    def __init__(self, hub_id: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub_id, self.files = hub_id, files
        self.trouble: int | str | None = None
        self.trouble_at = "/"  # the start of the paths that are in trouble
        self.headers: dict[str, str] = {}  # sent along with a status
        self.fetched: list[str] = []  # names of the files that were sent
        self.requests = 0
        self.released = threading.Event()
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests += 1
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.trouble is not None and path.startswith(hub.trouble_at):
            if hub.trouble == "hang":
                hub.released.wait(30)
            self._send(int(hub.trouble) if hub.trouble != "hang" else 500, b"{}", {**hub.headers}, body=body)
        elif path == f"/api/models/{hub.hub_id}":
            listing = {"id": hub.hub_id, "sha": REVISION, "siblings": [{"rfilename": name} for name in hub.files]}
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body=body)
        elif path.startswith(f"/{hub.hub_id}/resolve/"):
            self._file(path.split("/", 5)[5], body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)

    def _file(self, name: str, *, body: bool) -> None:
        data = self.server.files.get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        if body:
            self.server.fetched.append(name)
        self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION}, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serve(hub_id: str, directory: Path) -> Iterator[Hub]:
    """A hub with the files of a directory."""
    files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    hub = Hub(hub_id, files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        thread.join()
        hub.server_close()
