"""A loopback server with the hub's API: files by name, a CDN with range requests, and injected failures.

The endpoint redirects requests for a parquet file to the CDN, as the hub does for large files; other files
are served directly. Listing a repository fails and is recorded, since it takes too long on the real hub for
Ultra-FineWeb; the repositories in `listable` are small and may be listed.
"""

import hashlib
import json
import re
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "02c85641e3d19a854be2e09139c25adaa9518063"
DATASET = "openbmb/Ultra-FineWeb"
MODEL = "Qwen/Qwen3-0.6B-Base"


class HubServer:
    """Serve files and inject failures.

    Attributes:
        files: Contents by repository path, such as "datasets/org/name", and by the file's path in it. A path
            with "@" and a commit holds that commit, without it COMMIT.
        heads: Commit of the main branch by repository path, unless it is COMMIT.
        listable: Repository paths that may be listed.
        failures: Failures of the next requests for a file's content, in order: a status such as 503,
            ("close", n) to close the connection after n bytes, ("stall", n, seconds) to pause there, or None.
        head_failures: Statuses of the next requests for a file's location.
        log: Method, path and range of each request.
        listed: Requests that list a repository.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {f"datasets/{DATASET}": {}, MODEL: {}}
        self.decoys = [f"data/ultrafineweb_en_v1_4/CC-MAIN-{index}/part.parquet" for index in range(60_000)]
        self.heads: dict[str, str] = {}
        self.listable: set[str] = set()
        self.failures: deque[Any] = deque()
        self.head_failures: deque[int] = deque()
        self.log: list[tuple[str, str, str | None]] = []
        self.listed: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add_parts(self, parts: dict[str, bytes]) -> None:
        """Add files to the dataset."""
        self.files[f"datasets/{DATASET}"].update(parts)

    def requests(self, method: str, pattern: str = "") -> list[tuple[str, str | None]]:
        """Path and range of each request of a method whose path matches a pattern."""
        return [(path, span) for each, path, span in self.log if each == method and re.search(pattern, path)]

    def downloads(self) -> Counter[str]:
        """Number of downloads of each file that started at its first byte."""
        names = {_digest(data): name for files in self.files.values() for name, data in files.items()}
        whole = [path for path, span in self.requests("GET", "^/cdn/") if span is None]
        return Counter(names[path.removeprefix("/cdn/")] for path in whole)

    def commit(self, repository: str, revision: str) -> str:
        """The commit of a revision; a branch other than main is its own."""
        return self.heads.get(repository, COMMIT) if revision == "main" else revision

    def files_at(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """Files of a repository at a revision; None without the revision."""
        commit = self.commit(repository, revision)
        return self.files.get(repository if commit == COMMIT else f"{repository}@{commit}")

    def by_digest(self, digest: str) -> bytes | None:
        contents: Iterable[bytes] = (data for files in self.files.values() for data in files.values())
        return next((data for data in contents if _digest(data) == digest), None)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._respond()

        def do_GET(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def _respond(self) -> None:
            hub.log.append((self.command, self.path, self.headers.get("Range")))
            if self.path.startswith("/cdn/"):
                self._content(hub.by_digest(self.path.removeprefix("/cdn/")))
                return
            found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            listing = re.match(
                r"/api/((?:datasets|models)/[^/]+/[^/?]+)/?([^/?]*)/?([^/?]*)/?([^?]*)", self.path
            )
            if listing is not None and listing[1] in hub.listable:
                self._list(*listing.groups())
            elif re.match("/api/(datasets|models)/", self.path):
                hub.listed.append(self.path)
                self._status(500)
            elif found is None:
                self._status(404)
            elif self.command == "HEAD" and hub.head_failures:
                self._status(hub.head_failures.popleft())
            else:
                self._file(*found.groups())

        def _list(self, repository: str, what: str, revision: str, folder: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            revision = revision or "main"
            files = hub.files_at(repository, revision)
            if files is None:
                self._status(404, {"X-Error-Code": "RevisionNotFound"})
                return
            entries: list[dict[str, Any]] = []
            paths = urllib.parse.parse_qs(body).get("paths", [])
            for name, data in files.items():
                is_wanted = (
                    name in paths if what == "paths-info" else name.startswith(folder and folder + "/")
                )
                if is_wanted:
                    entries.append(
                        {"type": "file", "path": name, "size": len(data), "oid": _digest(data)[:40]}
                    )
            folders = {name.rpartition("/")[0] for name in files} - {""}
            entries += [
                {"type": "directory", "path": name, "oid": "0" * 40}
                for name in sorted(folders)
                if what == "tree" or name in paths
            ]
            answer: Any = {"id": repository.partition("/")[2], "sha": hub.commit(repository, revision)}
            self._content(json.dumps(entries if what in ("tree", "paths-info") else answer).encode())

        def _file(self, repository: str, revision: str, name: str) -> None:
            commit = {"X-Repo-Commit": hub.commit(repository, revision)}
            files = hub.files_at(repository, revision)
            if repository not in hub.files:
                self._status(404, {"X-Error-Code": "RepoNotFound"})
            elif files is None:
                self._status(404, {"X-Error-Code": "RevisionNotFound"})
            elif name not in files:
                self._status(404, {"X-Error-Code": "EntryNotFound", **commit})
            elif name.endswith(".parquet"):
                data = files[name]
                # another host than the endpoint, like the hub's CDN
                location = f"http://localhost:{hub.port}/cdn/{_digest(data)}"
                linked = {"X-Linked-Etag": f'"{_digest(data)}"', "X-Linked-Size": str(len(data))}
                self._status(302, {"Location": location, **commit, **linked})
            else:
                self._content(files[name], {"ETag": f'"{_digest(files[name])[:40]}"', **commit})

        def _content(self, data: bytes | None, headers: dict[str, str] | None = None) -> None:
            if data is None:
                self._status(404)
                return
            failure = hub.failures.popleft() if self.command == "GET" and hub.failures else None
            if isinstance(failure, int):
                self._status(failure, {"Retry-After": "1"} if failure == 429 else {})
                return
            first, end, size = 0, len(data), len(data)
            self.close_connection = failure is not None
            if span := self.headers.get("Range"):
                start, _, last = span.removeprefix("bytes=").partition("-")
                first, end = int(start), min(int(last) + 1, size) if last else size
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
            else:
                self.send_response(200)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(end - first))
            self.end_headers()
            if self.command == "HEAD":
                return
            body = data[first:end]
            if failure is None:
                self.wfile.write(body)
                return
            self.wfile.write(body[: failure[1]])
            self.wfile.flush()
            if failure[0] == "stall":
                # not time.sleep, which tests shorten for the client
                threading.Event().wait(failure[2])
                self.wfile.write(body[failure[1] :])

        def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
