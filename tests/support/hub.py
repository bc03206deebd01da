"""A hub of one model, as `huggingface_hub` asks it: over HTTP, from a directory."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

MODEL, COMMIT = "acme/tiny-moe", "a" * 40


class Hub(ThreadingHTTPServer):
    """Notes what was fetched. `chunk_pause_s`: between two chunks of 64 KiB."""

    daemon_threads = True

    def __init__(self, directory: Path, revisions: tuple[str, ...], chunk_pause_s: float) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler))
        self.directory, self.revisions, self.chunk_pause_s = directory, revisions, chunk_pause_s
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub(
    directory: Path, revisions: tuple[str, ...] = ("main",), chunk_pause_s: float = 0.0
) -> Iterator[Hub]:
    server = Hub(directory, revisions, chunk_pause_s)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        known = (*self.server.revisions, COMMIT)
        if MODEL not in path:
            self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            self._json([self._listed(file) for file in self._files()])
        elif path.startswith(f"/api/models/{MODEL}"):
            revision = path.rpartition("/")[2] if "/revision/" in path else "main"
            if revision not in known:
                self._json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
            else:
                self._json({"id": MODEL, "sha": COMMIT, "siblings": []})
        else:
            self._file(path.split(f"/{MODEL}/resolve/{COMMIT}/")[-1], body)

    def _files(self) -> list[Path]:
        return sorted(p for p in self.server.directory.rglob("*") if p.is_file())

    def _listed(self, file: Path) -> dict[str, object]:
        name = str(file.relative_to(self.server.directory))
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(name)}

    def _file(self, name: str, body: bool) -> None:
        file = self.server.directory / name
        if not file.is_file():
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        content = file.read_bytes()
        self._head(200, len(content), {"ETag": f'"{_etag(name)}"', "X-Repo-Commit": COMMIT})
        if body:
            self.server.fetched.append(name)
            with suppress(ConnectionError):  # who asked was killed
                for start in range(0, len(content), 1 << 16):
                    self.wfile.write(content[start : start + (1 << 16)])
                    time.sleep(self.server.chunk_pause_s)

    def _json(self, content: object, status: int = 200, error: str | None = None) -> None:
        raw = json.dumps(content).encode()
        self._head(status, len(raw), {"X-Error-Code": error} if error else {})
        if self.command == "GET":
            self.wfile.write(raw)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()


def _etag(name: str) -> str:
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
