"""A store of objects on this machine, as Google Cloud Storage's JSON interface has it.

The part of it that gcsfs and TensorStore use: whole, multipart and resumable uploads, ranges, listings
in pages, copies, batches of deletions, and conditions on an object's generation, without which neither
a lock nor TensorStore's own commits would be safe. What shall go wrong is said by `Store.fault`.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass(frozen=True)
class Object:
    content: bytes
    generation: int
    updated: float  # seconds, of the store's clock


class Store:
    """The buckets and their objects.

    Attributes:
        objects: by bucket and name.
        fault: fault(method, object or prefix) -> a status to answer with, or None to do what is asked.
        clock: seconds that the store's clock has been put forward.
        requests: (method, object or prefix) of each.
        page: names in a page of a listing.
    """

    def __init__(self, *buckets: str):
        self.objects: dict[str, dict[str, Object]] = {bucket: {} for bucket in buckets}
        self.fault: Callable[[str, str], int | None] = lambda method, name: None
        self.requests: list[tuple[str, str]] = []
        self.clock = 0.0
        self.page = 1000
        self.uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._number = itertools.count()

    def put(self, bucket: str, name: str, content: bytes) -> Object:
        with self.lock:
            now = 1_700_000_000.0 + self.clock
            made = Object(bytes(content), next(self._generations), now)
            self.objects[bucket][name] = made
            return made

    def begin(self, bucket: str, name: str, conditions: dict) -> str:
        key = str(next(self._number))
        self.uploads[key] = (bucket, name, conditions, bytearray())
        return key


def described(bucket: str, name: str, found: Object) -> dict[str, str]:
    quoted = urllib.parse.quote(name, safe="")
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{found.generation}",
        "selfLink": f"/storage/v1/b/{bucket}/o/{quoted}",
        "mediaLink": f"/download/storage/v1/b/{bucket}/o/{quoted}?alt=media",
        "name": name,
        "bucket": bucket,
        "generation": str(found.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "size": str(len(found.content)),
        "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
        "etag": str(found.generation),
        "timeCreated": date(found.updated),
        "updated": date(found.updated),
    }


def date(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Answer(Exception):
    """What a request ends with."""

    def __init__(self, status: int, body: dict | bytes | None = None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes out in one piece
    disable_nagle_algorithm = True
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(size)
        try:
            self._route(body)
            answer = Answer(404)
        except Answer as found:
            answer = found
        content = answer.body if isinstance(answer.body, bytes) else b""
        if isinstance(answer.body, dict):
            content = json.dumps(answer.body).encode()
        elif answer.body is None and answer.status >= 400:
            message = {"code": answer.status, "message": f"injected or real {answer.status}"}
            content = json.dumps({"error": message}).encode()
        with contextlib.suppress(ConnectionError):  # a client that was killed
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            if answer.status == 204:
                content = b""
            self.end_headers()
            self.wfile.write(content)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _route(self, body: bytes) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path = url.path.replace("/download/", "/", 1)
        if path.startswith("/batch/"):
            self._batch(body)
        if path.startswith("/upload/"):
            bucket = urllib.parse.unquote(path.split("/b/")[1].split("/o")[0])
            self._upload(bucket, query, body)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self._check("BUCKET", found[1])
            self._bucket(found[1])
            raise Answer(200, {"kind": "storage#bucket", "name": found[1]})
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            self._list(urllib.parse.unquote(found[1]), query)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", path):
            self._copy(*map(urllib.parse.unquote, found.groups()))
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)", path):
            bucket, name = map(urllib.parse.unquote, found.groups())
            if self.command == "DELETE":
                self._delete(bucket, name, query)
            self._get(bucket, name, query)

    def _check(self, method: str, name: str) -> None:
        self.store.requests.append((method, name))
        status = self.store.fault(method, name)
        if status:
            raise Answer(status)

    def _bucket(self, bucket: str) -> dict[str, Object]:
        if bucket not in self.store.objects:
            raise Answer(404)
        return self.store.objects[bucket]

    def _check_generation(self, bucket: str, name: str, query: dict) -> Object | None:
        found = self._bucket(bucket).get(name)
        generation = found.generation if found else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Answer(412)
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Answer(304 if found else 412, b"")
        return found

    def _upload(self, bucket: str, query: dict, body: bytes) -> None:
        kind = query["uploadType"]
        if "upload_id" in query:
            self._resume(query["upload_id"], body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            parts = re.split(b"\r?\n?--" + re.escape(boundary[1]).encode() + b"(?:--)?\r?\n?", body)
            head, content = parts[1], parts[2]
            name = json.loads(re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
        else:
            name = query.get("name") or json.loads(body)["name"]
            content = body
        if kind == "resumable":
            self._check("BEGIN", name)
            self._bucket(bucket)
            key = self.store.begin(bucket, name, query)
            host = self.headers["Host"]
            where = f"/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            raise Answer(200, b"", Location=f"http://{host}{where}")
        self._check("PUT", name)
        self._store(bucket, name, query, content)

    def _resume(self, key: str, body: bytes) -> None:
        bucket, name, conditions, content = self.store.uploads[key]
        self._check("PART", name)
        total = self.headers["Content-Range"].rpartition("/")[2]
        content += body
        if total == "*" or len(content) < int(total):
            raise Answer(308, b"", Range=f"bytes=0-{len(content) - 1}")
        self._store(bucket, name, conditions, bytes(content))

    def _store(self, bucket: str, name: str, query: dict, content: bytes) -> None:
        with self.store.lock:
            self._check_generation(bucket, name, query)
            made = self.store.put(bucket, name, content)
        raise Answer(200, described(bucket, name, made))

    def _get(self, bucket: str, name: str, query: dict) -> None:
        self._check("GET" if query.get("alt") == "media" else "INFO", name)
        found = self._check_generation(bucket, name, query)
        if found is None or query.get("generation", str(found.generation)) != str(found.generation):
            raise Answer(404)
        if query.get("alt") != "media":
            raise Answer(200, described(bucket, name, found))
        headers = {
            "x_goog_generation": str(found.generation),
            "x_goog_stored_content_length": str(len(found.content)),
            "ETag": f'"{found.generation}"',
        }
        if wanted := self.headers.get("Range"):
            span = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
            assert span
            size = len(found.content)
            begin = int(span[1]) if span[1] else max(0, size - int(span[2]))
            end = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
            if begin >= size:
                raise Answer(416)
            headers["Content_Range"] = f"bytes {begin}-{end}/{size}"
            raise Answer(206, found.content[begin : end + 1], **headers)
        digest = base64.b64encode(hashlib.md5(found.content).digest()).decode()
        raise Answer(200, found.content, x_goog_hash=f"md5={digest}", **headers)

    def _list(self, bucket: str, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        self._check("LIST", prefix)
        with self.store.lock:
            objects = dict(self._bucket(bucket))
        names = [name for name in sorted(objects) if name.startswith(prefix)]
        names = [name for name in names if name >= query.get("startOffset", "")]
        if query.get("endOffset"):
            names = [name for name in names if name < query["endOffset"]]
        if delimiter:  # all that go on behind one are one
            ends = {name: name.find(delimiter, len(prefix)) + 1 for name in names}
            names = sorted({name[: ends[name]] if ends[name] else name for name in names})
        begin = int(query.get("pageToken") or 0)
        end = begin + min(self.store.page, int(query.get("maxResults") or 1000))
        found: dict = {"kind": "storage#objects", "items": [], "prefixes": []}
        for name in names[begin:end]:
            if delimiter and name.endswith(delimiter) and name != prefix:
                found["prefixes"].append(name)
            else:
                found["items"].append(described(bucket, name, objects[name]))
        if end < len(names):
            found["nextPageToken"] = str(end)
        raise Answer(200, found)

    def _copy(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        self._check("COPY", name)
        with self.store.lock:
            found = self._bucket(bucket).get(name)
            self._bucket(to_bucket)
            if found is None:
                raise Answer(404)
            made = self.store.put(to_bucket, to_name, found.content)
        raise Answer(200, {"done": True, "resource": described(to_bucket, to_name, made)})

    def _delete(self, bucket: str, name: str, query: dict) -> None:
        self._check("DELETE", name)
        with self.store.lock:
            if self._check_generation(bucket, name, query) is None:
                raise Answer(404)
            del self.store.objects[bucket][name]
        raise Answer(204)

    def _batch(self, body: bytes) -> None:
        parts = []
        for found in re.finditer(rb"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)", body):
            bucket, name = (urllib.parse.unquote(x.decode()) for x in found.groups())
            try:
                self._delete(bucket, name, {})
            except Answer as answer:
                parts.append(
                    "--batch\r\nContent-Type: application/http\r\n\r\n"
                    f"HTTP/1.1 {answer.status} X\r\nContent-Length: 0\r\n\r\n\r\n"
                )
        content = ("".join(parts) + "--batch--\r\n").encode()
        raise Answer(200, content, Content_Type="multipart/mixed; boundary=batch")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Nothing: a client that was killed has not waited for its answer."""


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """The address of a store, while this is open."""
    handler = type("Of", (Handler,), {"store": store})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
