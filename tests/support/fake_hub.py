"""A Hugging Face hub on loopback that holds some folders, and remembers which files were asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories by name (`ORG/NAME`), each a folder; `fetched` are paths of files sent."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.fetched: list[str] = []
        self.url = ""

    def files(self, repository: str) -> list[Path]:
        folder = self.repositories[repository]
        return sorted(path for path in folder.rglob("*") if path.is_file())

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                status, body, headers = hub.answer(self.path.partition("?")[0], with_body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, path: str, sends: bool) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for what huggingface_hub asks."""
        for name, folder in self.repositories.items():
            if path.startswith(f"/api/models/{name}/revision/"):
                return self._json({"id": name, "sha": COMMIT, "siblings": []})
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [
                    {
                        "type": "file",
                        "path": str(file.relative_to(folder)),
                        "size": file.stat().st_size,
                        "oid": _etag(file),
                    }
                    for file in self.files(name)
                ]
                return self._json(entries)
            prefix = f"/{name}/resolve/{COMMIT}/"
            if path.startswith(prefix) and (file := folder / path.removeprefix(prefix)).is_file():
                if sends:
                    self.fetched.append(path.removeprefix(prefix))
                headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT}
                return 200, file.read_bytes(), headers
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    @staticmethod
    def _json(value: object) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
