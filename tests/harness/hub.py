"""Repositories of the hub: a cache in the client's own layout, and a server that its client can ask."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cache(
    root: Path, repository: str, files: Mapping[str, bytes], commit: str = COMMIT, refs: tuple[str, ...] = ("main",)
) -> Path:
    """Writes files of a commit as the client caches them: blobs by hash, links to them, and references.

    Returns:
        The folder of the snapshot.
    """
    kept = root / f"models--{repository.replace('/', '--')}"
    for name, data in files.items():
        blob = kept / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = kept / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("../" * (2 + name.count("/")) + f"blobs/{blob.name}")
    for reference in refs:
        path = kept / "refs" / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return kept / "snapshots" / commit


@contextmanager
def server(repository: str, files: Mapping[str, bytes], refs: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Serves one commit of a repository on this machine.

    Args:
        repository: its name.
        files: of the commit.
        refs: the commit of each branch and tag.

    Yields:
        The address, and the list of files that were given, which grows.
    """
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api = f"/api/models/{repository}"
            commits = {**refs, **{commit: commit for commit in refs.values()}}
            if path.startswith(f"{api}/revision/"):
                commit = commits.get(path.removeprefix(f"{api}/revision/"))
                if commit is None:
                    return self.give(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                about = {"id": repository, "modelId": repository, "sha": commit, "tags": [], "siblings": []}
                return self.give(200, json.dumps(about).encode())
            if path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.give(200, json.dumps(tree).encode())
            commit, _, name = path.removeprefix(f"/{repository}/resolve/").partition("/")
            if commit not in commits or name not in files:
                return self.give(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if self.command == "GET":
                given.append(name)
            data = files[name]
            return self.give(
                200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commits[commit]}
            )

        def give(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", given
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
