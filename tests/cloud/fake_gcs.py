# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and tensorstore use, in memory.

`python -m tests.cloud.fake_gcs PORT` serves one bucket, "bucket", until it is killed. Like the real thing it has
neither append nor folders, and a conditional write (`ifGenerationMatch`) fails where somebody else was faster.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
from typing import Any

BUCKET = "bucket"


class Store:
    """Objects by name: content and generation."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int, str]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.generation = 0
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes, wanted: str | None = None) -> dict[str, Any] | None:
        """The new object's metadata; None where its generation is not the one that is wanted."""
        with self.lock:
            present = self.objects.get(name, (b"", 0, ""))[1]
            if wanted is not None and int(wanted) != present:
                return None
            self.generation += 1
            now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
            self.objects[name] = content, self.generation, now
        return self.metadata(name)

    def metadata(self, name: str) -> dict[str, Any]:
        """What the API calls an object resource."""
        content, generation, now = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "id": f"{BUCKET}/{name}/{generation}",
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": now,
            "updated": now,
            "storageClass": "STANDARD",
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two of them wait for each other (Nagle)
    disable_nagle_algorithm = True
    store: Store

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        """JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that was killed
            if self.command != "HEAD":
                self.wfile.write(content)
            self.wfile.flush()

    def missing(self) -> None:
        """404 as the API has it."""
        self.answer(404, {"error": {"code": 404, "message": "No such object"}})

    def body(self) -> bytes:
        """The request's content."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def parts(self) -> tuple[str, dict[str, str]]:
        """Path and query."""
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def do_GET(self) -> None:
        """Metadata, content, listing."""
        path, query = self.parts()
        path = path.removeprefix("/download")
        if path == f"/storage/v1/b/{BUCKET}":
            return self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "HERE"})
        if path == f"/storage/v1/b/{BUCKET}/storageLayout":
            return self.answer(200, {"bucket": BUCKET, "hierarchicalNamespace": {"enabled": False}})
        if path == f"/storage/v1/b/{BUCKET}/o":
            return self.listing(query)
        found = re.fullmatch(rf"/storage/v1/b/{BUCKET}/o/(.+)", path) or re.fullmatch(rf"/{BUCKET}/(.+)", path)
        name = urllib.parse.unquote(found[1]) if found else ""
        if name not in self.store.objects:
            return self.missing()
        content, generation, _ = self.store.objects[name]
        if "ifGenerationNotMatch" in query and query["ifGenerationNotMatch"] == str(generation):
            return self.answer(304)
        if "ifGenerationMatch" in query and query["ifGenerationMatch"] != str(generation):
            return self.answer(412, {"error": {"code": 412, "message": "generation"}})
        if query.get("alt") != "media" and not path.startswith(f"/{BUCKET}/"):
            return self.answer(200, self.store.metadata(name))
        extra = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            if not wanted[1]:
                first, last = max(len(content) - int(wanted[2]), 0), len(content) - 1
            else:
                first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            if first >= len(content):
                return self.answer(416, b"", Content_Range=f"bytes */{len(content)}")
            extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **extra)
        return self.answer(200, content, **extra)

    do_HEAD = do_GET  # noqa: N815

    def listing(self, query: dict[str, str]) -> None:
        """Objects below a prefix; with a delimiter also the "folders"."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], []
        for name in sorted(self.store.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if query.get("endOffset") and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.append(prefix + rest.split(delimiter)[0] + delimiter)
                if not (query.get("includeTrailingDelimiter") == "true" and rest == rest.split(delimiter)[0] + "/"):
                    continue
            items.append(self.store.metadata(name))
        body = {"kind": "storage#objects", "items": items, "prefixes": sorted(set(prefixes))}
        self.answer(200, {k: v for k, v in body.items() if v})

    def do_POST(self) -> None:
        """Uploads, copies, compositions, batches of deletions."""
        path, query = self.parts()
        content = self.body()
        if path == f"/upload/storage/v1/b/{BUCKET}/o":
            return self.upload(query, content)
        if path.startswith("/batch"):
            return self.batch(content)
        copied = re.fullmatch(
            rf"/storage/v1/b/{BUCKET}/o/(.+)/(?:rewriteTo|copyTo|moveTo)(?:/b/{BUCKET})?/o/(.+)", path
        )
        if copied:
            source, target = (urllib.parse.unquote(part) for part in copied.groups())
            if source not in self.store.objects:
                return self.missing()
            made = self.store.put(target, self.store.objects[source][0])
            if "/moveTo/" in path:
                del self.store.objects[source]
            return self.answer(200, {"done": True, "resource": made, **made} if "rewriteTo" in path else made)
        return self.answer(404, {"error": {"code": 404, "message": f"the stand-in knows no {path}"}})

    def upload(self, query: dict[str, str], content: bytes) -> None:
        """media, multipart, or the start of a resumable one."""
        kind, name = query.get("uploadType"), query.get("name", "")
        if "upload_id" in query:
            return self.resume(query["upload_id"], content)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, data, *_ = content.split(b"--" + boundary)
            name = json.loads(described.split(b"\r\n\r\n" if b"\r\n\r\n" in described else b"\n\n", 1)[1])["name"]
            data = data.split(b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n", 1)[1]
            content = data.removesuffix(b"\n").removesuffix(b"\r")
        elif kind == "resumable":
            name = name or json.loads(content)["name"]
            key = str(len(self.store.uploads))
            self.store.uploads[key] = name, bytearray()
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={key}"
            return self.answer(200, b"", Location=place)
        made = self.store.put(name, content, query.get("ifGenerationMatch"))
        if made is None:
            return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        return self.answer(200, made)

    def do_PUT(self) -> None:
        """The next part of a resumable upload."""
        self.resume(self.parts()[1]["upload_id"], self.body())

    def resume(self, key: str, content: bytes) -> None:
        """A part of an upload; the last one says how many bytes there are."""
        name, data = self.store.uploads[key]
        data += content
        if (self.headers.get("Content-Range") or "").endswith("*"):
            return self.answer(308, b"", Range=f"bytes=0-{len(data) - 1}")
        return self.answer(200, self.store.put(name, bytes(data)))

    def do_DELETE(self) -> None:
        """One object."""
        path, _ = self.parts()
        name = urllib.parse.unquote(path.split("/o/", 1)[1])
        if self.store.objects.pop(name, None) is None:
            return self.missing()
        return self.answer(204)

    def batch(self, content: bytes) -> None:
        """Several deletions in one request."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        out = ""
        for number, place in enumerate(re.findall(rb"DELETE /storage/v1/b/[^/]+/o/(\S+)", content), 1):
            name = urllib.parse.unquote(place.decode().split("?")[0])
            code = "204 No Content" if self.store.objects.pop(name, None) else "404 Not Found"
            out += f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
            out += f"HTTP/1.1 {code}\r\n\r\n\r\n"
        body = f"{out}--{boundary}--\r\n".encode()
        self.answer(200, body, Content_Type=f"multipart/mixed; boundary={boundary}")


def serve(port: int) -> http.server.ThreadingHTTPServer:
    """A server on localhost, not yet running; 0 = a free port."""
    handler = type("Handler", (Handler,), {"store": Store()})
    server = http.server.ThreadingHTTPServer(("localhost", port), handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    serve(int(sys.argv[1])).serve_forever()
