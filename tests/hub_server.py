"""A Hugging Face Hub of a few bytes: repository info, file trees and downloads, over HTTP on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Files by path, by revision; the download of a gated repository needs the token."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False


def commit(repo_id: str, revision: str) -> str:
    return hashlib.sha1(f"{repo_id}@{revision}".encode()).hexdigest()


@dataclass
class Hub:
    """What is served and what was asked for."""

    repos: dict[str, Repo]
    token: str = ""
    url: str = ""
    cdn: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: int = 0
    """Bytes of weights so far."""

    def downloads(self) -> list[str]:
        return sorted(
            path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path
        )

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.repos[repo_id].revisions.items():
            if revision in (name, commit(repo_id, name)):
                return commit(repo_id, name), files
        return None


_API = re.compile(r"/api/models/(?P<repo>.+?)(/(?P<kind>revision|tree)/(?P<revision>.+))?")
_RESOLVE = re.compile(r"/(?P<cdn>cdn/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if match is None or match["repo"] not in self.hub.repos:
            self._refuse(401 if not self.headers["Authorization"] else 404, "RepoNotFound")
            return
        found = self.hub.find(match["repo"], unquote(match["revision"] or "main"))
        if found is None:
            self._refuse(404, "RevisionNotFound")
        elif path.startswith("/api/"):
            self._describe(match, *found)
        elif (
            not match["cdn"]
            and self.hub.repos[match["repo"]].gated
            and self.headers["Authorization"] != f"Bearer {self.hub.token}"
        ):
            self._refuse(403, "GatedRepo")
        else:
            self._serve(match, *found)

    def _describe(self, match: re.Match, sha: str, files: dict[str, bytes]) -> None:
        if match["kind"] == "tree":
            tree = [
                {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for p, b in files.items()
            ]
            self._send(200, json.dumps(tree).encode())
        else:
            info = {"id": match["repo"], "sha": sha, "siblings": [{"rfilename": path} for path in files]}
            self._send(200, json.dumps(info).encode())

    def _serve(self, match: re.Match, sha: str, files: dict[str, bytes]) -> None:
        """Weights are redirected to another address, as the Hub does."""
        if unquote(match["file"]) not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[unquote(match["file"])]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if match["cdn"]:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
            part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
            self.hub.sent += len(part)
            self._send(206 if wanted else 200, part, ETag=etag)
            return
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": etag}
        location = f"{self.hub.cdn}/cdn/{match['repo']}/resolve/{sha}/{match['file']}"
        self._send(302, b"", **{"X-Repo-Commit": sha, "ETag": etag, "Location": location}, **linked)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", **{"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serve(repos: dict[str, Repo], token: str = "") -> Iterator[Hub]:
    hub = Hub(repos, token)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        hub.cdn = f"http://localhost:{server.server_port}"  # another host: the token must not follow
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
