"""A Hugging Face Hub of a few bytes: repository info, file trees and downloads, over HTTP on this machine."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    honours_ranges: bool = True
    failures: list[str] = field(default_factory=list)
    """What the next downloads end with: `busy` (status 503), `expired` (403), or `cut` (half of the body)."""
    seconds: float = 0.0
    """That each download takes."""
    at_once: list[int] = field(default_factory=lambda: [0, 0])
    """Downloads that run now, and the most that ran at one time."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def downloading(self) -> Iterator[str]:
        """Counts a download, and gives what it is to end with, if with a failure."""
        with self.lock:
            self.at_once[0] += 1
            self.at_once[1] = max(self.at_once)
            failure = self.failures.pop(0) if self.failures else ""
        try:
            time.sleep(self.seconds)
            yield failure
        finally:
            with self.lock:
                self.at_once[0] -= 1

    def downloads(self) -> list[str]:
        return sorted(
            path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/cdn/" in path
        )

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.repos[repo_id].revisions.items():
            if revision in (name, commit(repo_id, name)):
                return commit(repo_id, name), files
        return None


_API = re.compile(r"/api/(?:models|datasets)/(?P<repo>.+?)(/(?P<kind>revision|tree)/(?P<revision>.+))?")
_RESOLVE = re.compile(r"/(?P<cdn>cdn/)?(?:datasets/)?(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


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
            info = {
                "id": match["repo"],
                "sha": sha,
                "siblings": [{"rfilename": p, "size": len(b)} for p, b in files.items()],
            }
            self._send(200, json.dumps(info).encode())

    def _serve(self, match: re.Match, sha: str, files: dict[str, bytes]) -> None:
        """Weights are redirected to another address, as the Hub does."""
        if unquote(match["file"]) not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[unquote(match["file"])]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if match["cdn"]:
            with self.hub.downloading() as failure:
                self._download(content, etag, failure)
            return
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": etag}
        location = f"{self.hub.cdn}/cdn/{match['repo']}/resolve/{sha}/{match['file']}"
        self._send(302, b"", **{"X-Repo-Commit": sha, "ETag": etag, "Location": location}, **linked)

    def _download(self, content: bytes, etag: str, failure: str) -> None:
        if failure in ("busy", "expired"):
            self._refuse(503 if failure == "busy" else 403, failure)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "") if self.hub.honours_ranges else None
        part = content[int(wanted[1]) : int(wanted[2]) + 1] if wanted else content
        with self.hub.lock:
            self.hub.sent += len(part)
        self._send(206 if wanted else 200, part, cut=failure == "cut", ETag=etag)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", **{"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that does not want the whole file goes away
                self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


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
