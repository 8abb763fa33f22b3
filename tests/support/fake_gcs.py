"""A fake Google Cloud Storage on loopback, with the part of the JSON API that its clients use.

gcsfs and google-cloud-storage find it through STORAGE_EMULATOR_HOST, tensorstore through
TENSORSTORE_GCS_HTTP_URL. `Server.environment` has both, and the variables without which the clients
would ask the network for credentials. As in the real one, an object is written whole or not at all,
a listing shows everything that was written, and preconditions on generations hold.
https://cloud.google.com/storage/docs/json_api/v1 describes the requests.
"""

import base64
import dataclasses
import datetime
import email.message
import email.parser
import http.server
import json
import pathlib
import re
import struct
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c


@dataclasses.dataclass
class Object:
    """One object of a bucket."""

    data: bytes
    generation: int
    updated: datetime.datetime


class Server:
    """The server; a context manager.

    Attributes:
      objects: the objects of all buckets, by (bucket, name).
      buckets: the names of the buckets that exist.
      forbidden: the names of buckets to which nobody has access.
      unreadable: the names of objects whose content cannot be read.
      hold: called with an object's name before it is written; if it returns True, the writer waits
        for ever, and `held` is set.
    """

    def __init__(self, *buckets: str):
        self.objects: dict[tuple[str, str], Object] = {}
        self.buckets = set(buckets)
        self.forbidden: set[str] = set()
        self.unreadable: set[str] = set()
        self.hold: Callable[[str], bool] = lambda name: False
        self.held = threading.Event()
        self.uploads: dict[str, tuple[str, str, Mapping[str, str], bytearray]] = {}
        self.lock = threading.RLock()
        self._generation = 1_000_000
        self._server = _Threads(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a process uses this server instead of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Returns the names of the objects in a bucket that begin with `prefix`, sorted."""
        with self.lock:
            found = [name for owner, name in self.objects if owner == bucket]
        return sorted(name for name in found if name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        """Returns the content of an object."""
        return self.objects[bucket, name].data

    def download(self, bucket: str, prefix: str, folder: pathlib.Path) -> pathlib.Path:
        """Copies the objects whose names begin with `prefix` to a folder, and returns it."""
        for name in self.names(bucket, prefix):
            path = folder / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(bucket, name))
        return folder

    def age(self, bucket: str, name: str, seconds: float) -> None:
        """Moves the time at which an object was last written into the past."""
        self.objects[bucket, name].updated -= datetime.timedelta(seconds=seconds)

    def put(self, bucket: str, name: str, data: bytes) -> Object:
        """Writes an object."""
        with self.lock:
            self._generation += 1
            now = datetime.datetime.now(datetime.UTC)
            self.objects[bucket, name] = Object(data, self._generation, now)
            return self.objects[bucket, name]


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: clients close connections early, and tests kill them."""


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    store: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        """Prints nothing."""

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        match = re.fullmatch(
            r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/(o)(?:/(.+))?)?", url.path
        )
        try:
            if match is None:
                raise _Refused(404, f"no such address: {self.path}")
            bucket = match[1]
            name = urllib.parse.unquote(match[3]) if match[3] else None
            if bucket not in self.store.buckets:
                raise _Refused(404, "The specified bucket does not exist.")
            if bucket in self.store.forbidden:
                raise _Refused(403, "somebody does not have storage.buckets.get access.")
            if self.command == "POST" and "/moveTo/o/" in url.path:
                self._move(bucket, *match[3].split("/moveTo/o/"))
            elif self.command in ("POST", "PUT"):
                self._upload(bucket, query, body)
            elif not match[2]:
                self._json({"kind": "storage#bucket", "name": bucket, "id": bucket})
            elif name is None:
                self._list(bucket, query)
            elif self.command == "DELETE":
                self._delete(bucket, name, query)
            else:
                self._read(bucket, name, query)
        except _Refused as refused:
            error = {"code": refused.status, "message": str(refused)}
            self._json({"error": error}, refused.status)

    do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _find(self, bucket: str, name: str) -> Object:
        try:
            return self.store.objects[bucket, name]
        except KeyError:
            raise _Refused(404, f"No such object: {bucket}/{name}") from None

    def _precondition(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        found = self.store.objects.get((bucket, name))
        generation = str(found.generation) if found else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def _delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        with self.store.lock:
            self._precondition(bucket, name, query)
            self._find(bucket, name)
            del self.store.objects[bucket, name]
        self._answer(204, b"")

    def _move(self, bucket: str, source: str, target: str) -> None:
        source, target = map(urllib.parse.unquote, (source, target))
        with self.store.lock:
            found = self.store.put(bucket, target, self._find(bucket, source).data)
            del self.store.objects[bucket, source]
        self._json(_resource(bucket, target, found))

    def _read(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        with self.store.lock:
            found = self._find(bucket, name)
            self._precondition(bucket, name, query)
        if query.get("ifGenerationNotMatch") == str(found.generation):
            self._answer(304, b"")
            return
        if query.get("alt") != "media":
            self._json(_resource(bucket, name, found))
            return
        if name in self.store.unreadable:
            raise _Refused(410, "not now")
        headers = {
            "x-goog-generation": str(found.generation),
            "x-goog-stored-content-length": str(len(found.data)),
            "Content-Type": "application/octet-stream",
        }
        data, status = found.data, 200
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(data)
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if first >= size:
                raise _Refused(416, "The requested range cannot be satisfied.")
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(status, data, headers)

    def _list(self, bucket: str, query: Mapping[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        after = query.get("pageToken", "")
        limit = int(query.get("maxResults", 1000))
        items: list[dict[str, Any]] = []
        prefixes: set[str] = set()
        last, token = "", None
        with self.store.lock:
            everything = list(self.store.objects.items())
        objects = {name: found for (owner, name), found in everything if owner == bucket}
        for name in sorted(name for name in objects if name.startswith(prefix)):
            if name < first or (end and name >= end) or (after and name <= after):
                continue
            if len(items) + len(prefixes) >= limit:
                token = last  # the next page continues after it
                break
            inside, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if delimiter and found:
                prefixes.add(prefix + inside + delimiter)
            else:
                items.append(_resource(bucket, name, objects[name]))
            last = name
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items}
        answer |= {"prefixes": sorted(prefixes)} if prefixes else {}
        self._json(answer | ({"nextPageToken": token} if token else {}))

    def _upload(self, bucket: str, query: Mapping[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if "upload_id" in query:
            self._part(query["upload_id"], body)
        elif kind == "media":
            self._write(bucket, query["name"], query, body)
        elif kind == "multipart":
            described, data = _parts(self.headers["Content-Type"], body)
            self._write(bucket, query.get("name") or described["name"], query, data)
        elif kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            key = f"upload{len(self.store.uploads)}"
            self.store.uploads[key] = bucket, name, query, bytearray()
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?upload_id={key}"
            self._answer(200, b"", {"Location": place})
        else:
            raise _Refused(400, f"no such upload: {self.path}")

    def _part(self, key: str, body: bytes) -> None:
        bucket, name, query, data = self.store.uploads[key]
        data += body
        size = self.headers["Content-Range"].rpartition("/")[2]
        if size == "*" or len(data) < int(size):
            self._answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        else:
            self._write(bucket, name, query, bytes(data))

    def _write(self, bucket: str, name: str, query: Mapping[str, str], data: bytes) -> None:
        if self.store.hold(name):
            self.store.held.set()
            threading.Event().wait()
        with self.store.lock:
            self._precondition(bucket, name, query)
            self._json(_resource(bucket, name, self.store.put(bucket, name, data)))

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _resource(bucket: str, name: str, found: Object) -> dict[str, Any]:
    crc = base64.b64encode(struct.pack(">I", google_crc32c.value(found.data))).decode()
    time = found.updated.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{found.generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "updated": time,
        "timeCreated": time,
        "crc32c": crc,
    }


def _parts(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Splits a multipart upload into the object's metadata and its content."""
    message = email.message.Message()
    message["Content-Type"] = content_type
    boundary = b"--" + str(message.get_param("boundary")).encode()
    newline = b"\r\n" if boundary + b"\r\n" in body else b"\n"
    _, first, second, _ = (part for part in body.split(boundary, 3))
    described = first.split(newline * 2, 1)[1]
    data = second.split(newline * 2, 1)[1].removesuffix(newline)
    return json.loads(described), data
