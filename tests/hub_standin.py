"""A stand-in for the Hub on this machine: as much of its HTTP API as pushing and loading a model needs.

```python
with HubStandIn() as hub:
    sha = hub.commit("me/model", {"config.json": b"{}"})
    subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})  # a process of its own: see `environment`
    assert hub.downloads("me/model") == ["config.json"]
```
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAX_REQUESTS = 5_000
MAX_BODY = 64 * 2**20
MAX_LIFETIME = 600.0  # seconds


@dataclasses.dataclass
class Commit:
    """One state of a repository."""

    sha: str
    files: dict[str, bytes]


@dataclasses.dataclass
class Repository:
    """A model repository: every commit, and which one each branch is at."""

    private: bool = False
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the new state of a branch; returns the commit."""
        digest = hashlib.sha1(f"{branch} {len(self.commits)}".encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha1(files[name]).digest())
        sha = digest.hexdigest()
        self.commits[sha] = Commit(sha, files)
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> Commit | None:
        """State at a branch or commit."""
        return self.commits.get(self.branches.get(revision, revision))


class HubStandIn:
    """An HTTP server on 127.0.0.1 that ends with its `with` block, or by itself after `MAX_LIFETIME`.

    Attributes:
        repositories: By name; change them at will between requests.
        log: Method and path of every request so far.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.log: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._timer = threading.Timer(MAX_LIFETIME, self._server.shutdown)
        self._timer.daemon = True

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        self._timer.start()
        return self

    def __exit__(self, *error) -> None:
        self._timer.cancel()
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """What to set HF_ENDPOINT to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that takes this for the Hub; huggingface_hub reads them when it is imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_standin",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def commit(self, repo_id: str, files: dict[str, bytes] | Path, branch: str = "main", keep: bool = False) -> str:
        """Put files, or those of a folder, into a repository; `keep` keeps the others that are there."""
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository())
            before = repository.at(branch)
            return repository.add(branch, {**(before.files if before and keep else {}), **files})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a repository."""
        return self.repositories[repo_id].at(revision).files

    def downloads(self, repo_id: str, since: int = 0, until: int | None = None) -> list[str]:
        """Names of the files of a repository whose content was fetched, from one request to another."""
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/[^/]+/(.+)")
        matches = [pattern.fullmatch(path) for method, path in self.log[since:until] if method == "GET"]
        return sorted({match.group(1) for match in matches if match})


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *args):
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.log.append((self.command, unquote(path)))
            if len(self.hub.log) > MAX_REQUESTS or length > MAX_BODY:
                self.close_connection = True
                return self._send(429, {"error": "the stand-in has had enough"})
            body = self.rfile.read(length)
            for pattern, name in _ROUTES:
                match = pattern.fullmatch(path)
                if match:
                    groups = [group and unquote(group) for group in match.groups()]
                    return getattr(self, name)(*groups, body)
            return self._send(404, {"error": f"the stand-in knows no {self.command} {path}"})

    def _send(self, status: int, content, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("content_type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

    def _missing(self, what: str) -> None:
        self._send(404, {"error": f"{what} not found"}, x_error_code=f"{what}NotFound", x_error_message=what)

    def _state(self, repo_id: str, revision: str) -> Commit | None:
        repository = self.hub.repositories.get(repo_id)
        state = repository.at(revision) if repository else None
        if state is None:
            self._missing("Revision" if repository else "Repo")
        return state

    # -- writing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = repo_id in self.hub.repositories
        if not known:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[repo_id] = Repository(private=bool(private))
            self.hub.repositories[repo_id].add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id})

    def branch(self, repo_id: str, branch: str, body: bytes) -> None:
        repository = self.hub.repositories[repo_id]
        known = branch in repository.branches
        if not known:
            start = (json.loads(body) if body else {}).get("startingPoint", "main")
            repository.branches[branch] = repository.at(start).sha
        self._send(409 if known else 200, {})

    def preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        if self._state(repo_id, revision) is not None:
            files = json.loads(body)["files"]
            answer = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._send(200, {"files": answer})

    def commit(self, repo_id: str, branch: str, body: bytes) -> None:
        state = self._state(repo_id, branch)
        if state is None:
            return
        files = dict(state.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] != "header":
                return self._send(400, {"error": f"the stand-in takes no {entry['key']}"})
        sha = self.hub.repositories[repo_id].add(branch, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{sha}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": sha})

    def validate(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    # -- reading

    def info(self, repo_id: str, revision: str | None, body: bytes) -> None:
        state = self._state(repo_id, revision or "main")
        if state is not None:
            private = self.hub.repositories[repo_id].private
            siblings = [{"rfilename": name} for name in sorted(state.files)]
            names = {"id": repo_id, "modelId": repo_id}
            self._send(200, {**names, "sha": state.sha, "private": private, "siblings": siblings})

    def refs(self, repo_id: str, body: bytes) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            return self._missing("Repo")
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.branches.items()
        ]
        self._send(200, {"branches": branches, "tags": [], "converts": []})

    def tree(self, repo_id: str, revision: str, folder: str | None, body: bytes) -> None:
        state = self._state(repo_id, revision)
        if state is None:
            return
        files = {name: data for name, data in state.files.items() if name.startswith(f"{folder}/" if folder else "")}
        if folder and not files:
            return self._missing("Entry")
        self._send(200, [_file(name, data) for name, data in sorted(files.items())])

    def paths(self, repo_id: str, revision: str, body: bytes) -> None:
        state = self._state(repo_id, revision)
        if state is not None:
            asked = json.loads(body)["paths"]
            self._send(200, [_file(name, state.files[name]) for name in asked if name in state.files])

    def resolve(self, repo_id: str, revision: str, name: str, body: bytes) -> None:
        state = self._state(repo_id, revision)
        if state is None:
            return
        if name not in state.files:
            headers = {"x_error_code": "EntryNotFound", "x_repo_commit": state.sha}
            return self._send(404, {"error": "Entry not found"}, **headers)
        data = state.files[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data, x_repo_commit=state.sha, etag=etag, content_type="application/octet-stream")


def _file(name: str, data: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"/api/repos/create", "create"),
        (r"/api/validate-yaml", "validate"),
        (rf"/api/models/{_REPO}/branch/(.+)", "branch"),
        (rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
        (rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
        (rf"/api/models/{_REPO}/refs", "refs"),
        (rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
        (rf"/api/models/{_REPO}/paths-info/([^/]+)", "paths"),
        (rf"/api/models/{_REPO}(?:/revision/([^/]+))?", "info"),
        (rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
    )
]
