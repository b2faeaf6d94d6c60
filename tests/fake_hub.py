"""A small Hugging Face hub on 127.0.0.1: enough of its HTTP interface for the real client to list and download.

Headers and error codes are those that huggingface_hub's `hf_raise_for_status` and `get_hf_file_metadata` read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_is_allowed"


@dataclass
class Repo:
    """One repository: revision -> file name -> content."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit hash of a branch, tag or commit; None if there is no such revision."""
        hashes = {name: hashlib.sha1(repr(files).encode()).hexdigest() for name, files in self.revisions.items()}
        return hashes.get(revision) or (revision if revision in hashes.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


@dataclass
class FakeHub:
    """Serves `repos` while used as a context manager; `requests` lists what was asked for, as (method, path, range)."""

    repos: dict[str, Repo]
    break_after: dict[str, int] = field(default_factory=dict)  # file -> bytes sent before the line breaks, once
    claimed_size: dict[str, int] = field(default_factory=dict)  # file -> the size that the listing claims
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloaded(self) -> set[str]:
        """The names of the files whose content was sent to the end."""
        return {
            path.rpartition("/")[2]
            for method, path, part in self.requests
            if method == "GET" and "/resolve/" in path and (part is None or part.endswith("-"))
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the test's output belongs to the test."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._error(401, "RepoNotFound", "Invalid username or password.")
        revision = (api[3] or "main") if api else match[2]
        commit = repo.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and api[2] == "tree":
            return self._json([self._entry(name, data) for name, data in repo.files(revision).items()])
        if api:
            siblings = [
                {"rfilename": name, "size": self._size(name, data)} for name, data in repo.files(revision).items()
            ]
            return self._json({"id": match[1], "sha": commit, "gated": repo.gated, "siblings": siblings})
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "GatedRepo", f"Access to model {match[1]} is restricted.")
        data = repo.files(revision).get(match[3])
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._file(match[3], data, commit)

    def _size(self, name: str, data: bytes) -> int:
        return self.hub.claimed_size.get(name, len(data))

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": self._size(name, data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, whole = (int(asked[1]) if asked else 0), len(data)
        if asked:
            data = data[: int(asked[2]) + 1] if asked[2] else data
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{whole}"
        self._head(206 if asked else 200, len(data) - start, headers)
        if self.command == "HEAD":
            return
        broken = self.hub.break_after.pop(name, None)
        self.wfile.write(data[start:broken])
        self.close_connection = broken is not None

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(200, len(body), {"Content-Type": "application/json"})
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str) -> None:
        self._head(status, 0, {"X-Error-Code": code, "X-Error-Message": message})

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
