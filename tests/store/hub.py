"""A hub of one process on loopback: just what huggingface_hub asks for when a folder is uploaded and comes back."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "a" * 40


class Hub:
    """Its repositories: name -> file -> bytes; `denied` answers every request with that status."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.private: dict[str, bool] = {}
        self.denied: int | None = None
        self.endpoint = ""


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    @property
    def hub(self) -> Hub:
        found: Any = self.server
        return found.hub

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if self.hub.denied is not None:
            self.answer({"error": "no"}, self.hub.denied)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": files})
        else:
            self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)

    def create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, {})
        self.hub.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
        self.answer({"url": f"{self.hub.endpoint}/{name}"}, status)

    def commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.hub.repos[name][line["value"]["path"]] = content
        self.hub.commits.append(name)
        self.answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not path.startswith("/api/models/"):
            name, _, file = path[1:].partition("/resolve/")
            data = self.hub.repos[name][file.partition("/")[2]]
            self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            return
        name = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
        if name not in self.hub.repos:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        if "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
                    for file, data in self.hub.repos[name].items()
                ]
            )
            return
        siblings = [{"rfilename": file} for file in self.hub.repos[name]]
        self.answer({"id": name, "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET


@contextmanager
def running() -> Iterator[Hub]:
    """A hub at work."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub()
    server.hub = hub  # type: ignore[attr-defined]
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
