"""A hub on this machine: the part of its protocol that uploads and downloads of models use."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS = ".safetensors"  # what the real hub keeps in large-file storage


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: {repository: {path: bytes}}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}  # large files by sha256, before a commit names them
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(k.encode() + v for k, v in sorted(files.items()))).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for (method, pattern), act in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return act(self, *match.groups(), body=body)
        return self.answer({"error": f"no route {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self, body):
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.server.repositories.setdefault(name, {})
        self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def info(self, repository, revision, *, body):
        files = self.server.repositories[repository]
        siblings = [{"rfilename": name} for name in sorted(files)]
        about = {"id": repository, "sha": commit_of(files), "siblings": siblings}
        self.answer(about | {"private": True, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repository, revision, *, body):
        rows = []
        for path, data in self.server.repositories[repository].items():
            row = {"type": "file", "path": path, "size": len(data)}
            rows.append(row | {"oid": hashlib.sha1(data).hexdigest()})
        self.answer(rows)

    def preupload(self, repository, revision, *, body):
        files = json.loads(body)["files"]
        mode = lambda path: "lfs" if path.endswith(LFS) else "regular"  # noqa: E731
        about = lambda f: {"path": f["path"], "uploadMode": mode(f["path"])}  # noqa: E731
        self.answer({"files": [about(f) | {"shouldIgnore": False} for f in files]})

    def batch(self, repository, *, body):
        objects = json.loads(body)["objects"]
        for o in objects:
            o["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid, *, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self.answer({})

    def commit(self, repository, revision, *, body):
        files = self.server.repositories[repository]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        sha = commit_of(files)
        url = f"{self.server.url}/{repository}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    def resolve(self, repository, revision, path, *, body):
        files = self.server.repositories[repository]
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.answer(files[path], ETag=etag, X_Repo_Commit=commit_of(files))


REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    ("POST", "/api/repos/create"): Handler.create,
    ("GET", f"/api/models/{REPOSITORY}/revision/([^/]+)"): Handler.info,
    ("GET", f"/api/models/{REPOSITORY}/tree/([^/]+)"): Handler.tree,
    ("POST", f"/api/models/{REPOSITORY}/preupload/([^/]+)"): Handler.preupload,
    ("POST", f"/{REPOSITORY}.git/info/lfs/objects/batch"): Handler.batch,
    ("PUT", "/lfs/([0-9a-f]+)"): Handler.store,
    ("POST", f"/api/models/{REPOSITORY}/commit/([^/]+)"): Handler.commit,
    ("GET", f"/{REPOSITORY}/resolve/([^/]+)/(.+)"): Handler.resolve,
    ("HEAD", f"/{REPOSITORY}/resolve/([^/]+)/(.+)"): Handler.resolve,
}
