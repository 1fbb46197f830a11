"""A loopback stand-in for the Hugging Face hub: what huggingface_hub asks for without xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast
from urllib.parse import urlsplit

Files = dict[str, bytes]
Answer = dict[str, Any] | list[dict[str, Any]]

_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_FILE = rf"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)"
# Requests that are answered with JSON, by the name of the method that answers.
_ROUTES = {
    "info": rf"GET /api/models/{_REPO}(?:/revision/{_REVISION})?",
    "tree": rf"GET /api/models/{_REPO}/tree/{_REVISION}",
    "validate_card": r"POST /api/validate-yaml",
    "create": r"POST /api/repos/create",
    "preupload": rf"POST /api/models/{_REPO}/preupload/{_REVISION}",
    "batch": rf"POST /{_REPO}\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(?P<oid>[0-9a-f]{64})",
    "commit": rf"POST /api/models/{_REPO}/commit/{_REVISION}",
}


class Refusal(Exception):  # noqa: N818
    """An answer other than 200: the status, and the code by which the client tells them apart."""

    def __init__(self, status: int, code: str, **answer: str) -> None:
        super().__init__(status, code)
        self.status, self.code, self.answer = status, code, answer


class HubStandIn(ThreadingHTTPServer):
    """A hub without repositories, served until the `with` block ends.

    `repos` maps repository, revision and file name to bytes. Files of a `gated` repository and
    paths that begin with `forbidden` are answered 403.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, Files]] = {}
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.forbidden: tuple[str, ...] = ()
        self._large_files: Files = {}
        # A short poll: shutdown() waits for it, in every test.
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def files_asked_for(self) -> set[str]:
        """The names of the files that were asked for, of whatever repository."""
        found = (re.fullmatch(_FILE, path) for _, path in self.requests)
        return {match["name"] for match in found if match}

    def file(self, repo: str, revision: str, name: str) -> tuple[bytes, dict[str, str]]:
        """A file, and the headers that go with it."""
        files = self._find(repo, revision)
        # As on the real hub, everybody may list a gated repository.
        if repo in self.gated:
            raise Refusal(403, "GatedRepo")
        if name not in files:
            raise Refusal(404, "EntryNotFound")
        etag = hashlib.sha256(files[name]).hexdigest()
        return files[name], {"X-Repo-Commit": commit_id(files), "ETag": f'"{etag}"'}

    def info(self, body: bytes, repo: str, revision: str | None) -> Answer:  # noqa: ARG002
        files = self._find(repo, revision)
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": commit_id(files), "siblings": siblings}

    def tree(self, body: bytes, repo: str, revision: str) -> Answer:  # noqa: ARG002
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self._find(repo, revision).items()
        ]

    def validate_card(self, body: bytes) -> Answer:
        if not json.loads(body)["content"].startswith("---\n"):
            raise Refusal(400, "NoFrontMatter")
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.url}/{repo}"
        if repo in self.repos:
            raise Refusal(409, "RepoExists", url=url)
        self.repos[repo] = {"main": {}}
        return {"url": url}

    def preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        self._find(repo, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        pairs = zip(paths, modes, strict=True)
        return {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in pairs]}

    def batch(self, body: bytes, repo: str) -> Answer:
        self._find(repo, None)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
        return {"objects": objects}

    def put(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "HashMismatch")
        self._large_files[oid] = body
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> Answer:
        files = dict(self._find(repo, revision))
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self._large_files:
                files[value["path"]] = self._large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise Refusal(400, "BadCommit")
        self.repos[repo][revision] = files
        commit = commit_id(files)
        return {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit}

    def _find(self, repo: str, revision: str | None) -> Files:
        """The files of a branch or tag, or of the commit that one of them points to."""
        if repo not in self.repos:
            raise Refusal(404, "RepoNotFound")
        revisions = self.repos[repo]
        commits = {commit_id(files): files for files in revisions.values()}
        files = {**commits, **revisions}.get(revision or "main")
        if files is None:
            raise Refusal(404, "RevisionNotFound")
        return files


def commit_id(files: Files) -> str:
    """Forty hex digits that, like git's, are the same only for the same files."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return hashlib.sha1(json.dumps(digests, sort_keys=True).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        hub, path = cast(HubStandIn, self.server), urlsplit(self.path).path
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, (data, headers) = 200, _find_answer(hub, self.command, path, body)
        except Refusal as refusal:
            status, headers = refusal.status, {"X-Error-Code": refusal.code}
            data = json.dumps(refusal.answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are kept in `requests`."""


def _find_answer(
    hub: HubStandIn, method: str, path: str, body: bytes
) -> tuple[bytes, dict[str, str]]:
    if path.startswith(hub.forbidden):
        raise Refusal(403, "Forbidden")
    if method in ("GET", "HEAD") and (match := re.fullmatch(_FILE, path)):
        return hub.file(**match.groupdict())
    for name, pattern in _ROUTES.items():
        if match := re.fullmatch(pattern, f"{method} {path}"):
            answer = getattr(hub, name)(body, **match.groupdict())
            return json.dumps(answer).encode(), {"Content-Type": "application/json"}
    raise Refusal(404, "NoSuchRoute")
