"""A stand-in for the Hugging Face hub on this machine: the few endpoints that an upload asks, over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_test"


class Hub:
    """``repos``: name → its files; ``private``: the names that were made private; ``down``: endpoints that fail."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.address = ""
        self._large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if any(path.startswith(start) for start in self.down):
            return 500, {"error": "out of order"}
        if method == "PUT" and path.startswith("/storage/"):
            self._large[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/":
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "alice", "orgs": [{"name": "acme"}]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.repos[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            return 200, {"url": f"{self.address}/{name}"}
        return self._of_repo(method, path, body)

    def _of_repo(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [
                {**one, "actions": {"upload": {"href": f"{self.address}/storage/{one['oid']}"}}} for one in objects
            ]
            return 200, {"transfer": "basic", "objects": upload}
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if not rest or rest[0] == "revision":
            return 200, {"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": []}
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return 200, {"files": modes}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self._large[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            code, value = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            text = json.dumps(value).encode()
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _any  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def downloads(repos: dict[str, tuple[str, Path]]) -> Iterator[str]:
    """The address of a hub from which files are fetched; ``repos``: name → its commit, and its files."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts == [""]:
                return self._send(b"")
            api = parts[:2] == ["api", "models"]
            owner, name, *rest = parts[2:] if api else parts
            commit, folder = repos[f"{owner}/{name}"]
            if not api:  # owner/name/resolve/revision/file
                return self._send((folder / rest[-1]).read_bytes(), commit)
            files = [path for path in sorted(folder.iterdir()) if path.is_file()]
            if rest[:1] == ["tree"]:
                rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _digest(f)} for f in files]
                return self._send(json.dumps(rows).encode(), commit)
            siblings = [{"rfilename": file.name} for file in files]
            what = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": commit, "siblings": siblings}
            return self._send(json.dumps(what).encode(), commit)

        do_HEAD = do_GET  # noqa: N815

        def _send(self, body: bytes, commit: str = "") -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()[:40]
