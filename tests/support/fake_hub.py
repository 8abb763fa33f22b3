"""A hub on loopback that answers as the Hugging Face Hub does, and a server of its large files.

tests/parity/convert/test_hub.py reads it with the hub's own client.
"""

import contextlib
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

COMMITS = ("1" * 40, "2" * 40)
NAME = "someone/mobilenet_v2"
TOKEN = "hf_secret"


class Server(http.server.ThreadingHTTPServer):
    """Serves a hub, and under /storage/ the large files to which a hub redirects.

    Attributes:
      storage: another server, for the same files.
      files: of the repository NAME, in all its commits.
      commit: of the branch main.
      moved: where large files are; "" if the hub sends them itself.
      gated, private: whether a request needs TOKEN, and how its refusal is worded.
      closed: whether even TOKEN does not open the repository.
      breaks: after how many bytes the next answers with a large file break off.
      stated: the SHA-256 that the hub states for large files, where it is a wrong one.
      asked: the path, the token and the Range of each request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.storage = self
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.commit, self.moved, self.stated = COMMITS[0], "", ""
        self.gated = self.private = self.closed = False
        self.breaks: list[int] = []
        self.asked: list[tuple[str, str | None, str | None]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        server, path = self.server, self.path
        token = self.headers.get("Authorization")
        server.asked.append((path, token, self.headers.get("Range")))
        if path.startswith("/storage/"):
            return self.send_file(server.files[path.rpartition("/")[2]])
        opened = token == f"Bearer {TOKEN}" and not server.closed
        if token not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "")
        if server.private and not opened:
            return self.refuse(404 if token else 401, "RepoNotFound")
        if path.startswith(f"/api/models/{NAME}/revision/"):
            return self.send_listing(path.removesuffix("?blobs=true").rpartition("/")[2])
        if not path.startswith(f"/{NAME}/resolve/"):
            return self.refuse(404 if token else 401, "RepoNotFound")
        if server.gated and not opened:
            return self.refuse(403 if token else 401, "GatedRepo")
        *_, commit, name = path.split("/")
        assert commit in COMMITS
        if server.moved and is_large(name):
            return self.redirect(f"{server.moved}/storage/{name}")
        return self.send_file(server.files[name])

    def send_listing(self, revision: str):
        commits = {"main": self.server.commit, "refs%2Fpr%2F1": COMMITS[1]}
        commit = commits.get(revision, revision)
        if commit not in COMMITS:
            return self.refuse(404, "RevisionNotFound")
        siblings: list[dict[str, Any]] = []
        for name, content in self.server.files.items():
            siblings.append({"rfilename": name, "size": len(content), "blobId": "3" * 40})
            if is_large(name):
                sha256 = self.server.stated or hashlib.sha256(content).hexdigest()
                siblings[-1]["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        return self.send_file(
            json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode()
        )

    def send_file(self, content: bytes):
        asked, start = self.headers.get("Range"), 0
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if asked and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        breaks = self.server.breaks if is_large(self.path) else []
        stop = breaks.pop(0) if breaks else len(content)
        self.wfile.write(content[start:stop])
        if stop < len(content):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def redirect(self, address: str):
        self.send_response(302)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refuse(self, code: int, reason: str):
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".onnx"))


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Server]:
    """Yields a hub with a repository of these files, whose `storage` runs beside it."""
    with Server() as hub, Server() as storage:
        hub.storage = storage
        hub.files = storage.files = files
        storage.breaks = hub.breaks
        threads = [
            threading.Thread(target=each.serve_forever, args=(0.01,)) for each in (hub, storage)
        ]
        for thread in threads:
            thread.start()
        yield hub
        for each in (hub, storage):
            each.shutdown()
        for thread in threads:
            thread.join()
