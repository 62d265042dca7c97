"""A Hub on localhost: what `push_to_hub`, `load_dataset` and `from_pretrained` ask of huggingface.co, and no more.

    with FakeHub() as hub:
        subprocess.run([...], env=os.environ | hub.environment(cache))
        hub.files["datasets", "someone/sounds"]["README.md"]

Repositories are kept in memory: the files of `main`, every commit, and whatever `hub.refs` names. Who may read and
write is decided as the Hub does it; `hub.fault` makes it fail.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER, TOKEN = "someone", "hf_x"
STRANGER = "hf_y"  # a token that is good, but of somebody who may not see what is private
LARGE = (".parquet", ".safetensors", ".bin")


class FakeHub:
    """The files of each repository, by kind (`"models"` or `"datasets"`) and name, and what was asked for."""

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str, str], dict[str, bytes]] = {}  # branches and tags by kind, name and their own
        self.private: set[tuple[str, str]] = set()
        self.read_only: set[tuple[str, str]] = set()
        self.on_auth_check: Callable[[], object] = bool
        self.licenses: dict[tuple[str, str], str] = {}
        self.large: dict[str, bytes] = {}  # by their SHA-256: large files are sent before the commit that names them
        self.requests: list[str] = []
        # What becomes of a request "GET /path": nothing out of the way, an answer with this status, or a connection
        # that ends: before the answer ("drop") or halfway through it ("cut").
        self.fault: Callable[[str], int | str | None] = lambda request: None

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: str | Path) -> dict[str, str]:
        """The variables that send a process here instead of to huggingface.co."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip


def check_players(hub: FakeHub, kind: str, name: str, at_least: int = 1) -> str:
    """The card of a repository, after all that it shows was found at the address that it gives."""
    card = hub.files[kind, name]["README.md"].decode()
    addresses = re.findall(r'<audio controls src="([^"]+)"></audio>', card)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    assert len(addresses) >= at_least and pictures
    prefix = f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}/resolve/main/"
    for address in addresses + pictures:
        assert address.startswith(prefix)
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request) as answer:
            assert answer.read(4) in ((b"RIFF", b"fLaC") if address in addresses else (b"\x89PNG",))
    return card


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({path: _blob(data) for path, data in sorted(files.items())}).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self._fails():
            return None
        path = self._path()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check/write", path):
            if self._may_write(match.groups()):
                self._json({})
                self.hub.on_auth_check()
            return None
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if (files := self._files(match[1], match[2], match[3])) is not None:
                private = match.groups()[:2] in self.hub.private
                siblings = [{"rfilename": name} for name in sorted(files)]
                card = {"license": self.hub.licenses.get(match.groups()[:2])}
                self._json({
                    "_id": "1", "id": match[2], "sha": _commit(files), "private": private, "tags": [], "downloads": 0,
                    "likes": 0, "siblings": siblings, "cardData": card,
                })  # fmt: skip
            return None
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            if (files := self._files(match[1], match[2], match[3])) is not None:
                entries = self._tree(files, match[4] or "", recursive="recursive=true" in self.path.lower())
                if match[4] and not entries:
                    return self._missing("EntryNotFound")
                self._json(entries)
            return None
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (files := self._files(match[1] or "models", match[2], match[3])) is None:
                return None
            headers = {"X-Repo-Commit": _commit(files)}
            if match[4] not in files:
                return self._missing("EntryNotFound", headers)
            return self._content(files[match[4]], headers)
        return self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self._fails():
            return None
        body, path = self._body(), self._path()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repository = (wanted.get("type", "model") + "s", f"{wanted.get('organization') or USER}/{wanted['name']}")
            if not self._may_write():
                return None
            kind, name = repository
            url = f"{self.hub.url}/{name}" if kind == "models" else f"{self.hub.url}/{kind}/{name}"
            if repository in self.hub.files:
                return self._json({"error": "exists", "url": url}, 409)
            self.hub.files[repository] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repository)
            return self._json({"url": url, "name": name, "id": "1"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit|paths-info)/([^/]+)", path)
        if not match:
            return self._missing("RepoNotFound")
        if (files := self._files(match[1], match[2], match[4])) is None or not self._may_write(match.groups()[:2]):
            return None
        if match[3] == "preupload":
            entries = [
                {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in json.loads(body)["files"])
            ]
            return self._json({"files": entries})
        if match[3] == "paths-info":
            entries = {entry["path"]: entry for entry in self._tree(files, "", recursive=True)}
            return self._json([entries[path] for path in json.loads(body)["paths"] if path in entries])
        for operation in map(json.loads, filter(None, body.decode().splitlines())):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = _commit(files)
        self.hub.commits[commit] = dict(files)
        url = f"{self.hub.url}/{match[2]}/commit/{commit}"
        return self._json({"commitUrl": url, "commitOid": commit, "commitMessage": "", "success": True})

    def do_PUT(self) -> None:
        if self._fails():
            return
        oid, body = self._path().removeprefix("/large/"), self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send(200, b"", {})

    def _path(self) -> str:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fails(self) -> bool:
        """Whether this request is one that `hub.fault` lets fail; then it has been answered, or the line is dead."""
        fault = self.hub.fault(f"{self.command} {unquote(self.path)}")
        self._cut = fault == "cut"
        if isinstance(fault, int):
            self._body()
            self._json({"error": "something is wrong here"}, fault)
        elif fault == "drop":
            self._hang_up()
        return fault is not None and not self._cut

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _files(self, kind: str, name: str, revision: str | None = None) -> dict[str, bytes] | None:
        """What a revision holds. If the asker may not see it, or there is none, the answer says so as the Hub does."""
        files = self.hub.files.get((kind, name))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, STRANGER):
            wrong = "Invalid credentials in Authorization header"
            self._send(401, json.dumps({"error": wrong}).encode(), {"X-Error-Message": wrong})
            return None
        if files is None or ((kind, name) in self.hub.private and token != TOKEN):
            if token:
                self._missing("RepoNotFound")
            else:
                self._json({"error": "Invalid username or password."}, 401)
            return None
        if revision in (None, "main") or revision == _commit(files):
            return files
        found = self.hub.refs.get((kind, name, revision), self.hub.commits.get(revision))
        if found is None:
            self._missing("RevisionNotFound")
        return found

    def _may_write(self, repository: tuple | None = None) -> bool:
        """Whether the token is good, also for this repository. If not, the answer says so."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
        elif repository in self.hub.read_only:
            self._json({"error": "You don't have the rights to write here."}, 403)
        else:
            return True
        return False

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        entries = {}
        for path, data in sorted(files.items()):
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            rest = path[len(folder) + 1 if folder else 0 :].split("/")
            for depth in range(1, len(rest)):
                parent = "/".join(filter(None, [folder, *rest[:depth]]))
                if depth == 1 or recursive:
                    entries[parent] = {"type": "directory", "oid": _blob(parent.encode()), "size": 0, "path": parent}
            if len(rest) == 1 or recursive:
                entries[path] = {"type": "file", "oid": _blob(data), "size": len(data), "path": path}
        return list(entries.values())

    def _json(self, value: dict | list, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, what: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, json.dumps({"error": what}).encode(), {"X-Error-Code": what, **(headers or {})})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{_blob(data)}"', "Accept-Ranges": "bytes", **headers}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], headers)
        return self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self._cut else body)
        if self._cut:
            self._hang_up()
