"""A small S3 endpoint on loopback that keeps objects in memory, and misbehaves as told.

It speaks as much of S3 as qpipe asks of it: GET, HEAD, PUT (also `If-None-Match: *`) and DELETE of /bucket/key. What it
does wrong is said by `behaviour`, a function of the request that returns one of the words in `Handler.misbehave`.
"""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable
from typing import Any

Behaviour = Callable[[str, str], str]
"""(method, path) -> what to do: "" for the right thing."""

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "anybody",
    "AWS_SECRET_ACCESS_KEY": "whatever",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server(http.server.ThreadingHTTPServer):
    """The endpoint; `asked` lists every request as (method, path), `sent` counts the bytes of all bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.behaviour: Behaviour = lambda method, path: ""
        self.asked: list[tuple[str, str]] = []
        self.sent = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}"}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not news."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request at a time of one connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if (content := self.find()) is not None:
            self.answer(200, content)

    def do_HEAD(self) -> None:
        if (content := self.find()) is not None:
            self.answer(200, content, body=False)

    def do_PUT(self) -> None:
        content = self.received()
        if self.begin():
            return
        with self.server.lock:
            taken = self.headers.get("If-None-Match") == "*" and self.path in self.server.objects
            if not taken:
                self.server.objects[self.path] = content
        self.refuse(412, "PreconditionFailed") if taken else self.answer(200, b"")

    def do_DELETE(self) -> None:
        if not self.begin():
            self.server.objects.pop(self.path, None)
            self.answer(204, b"")

    def received(self) -> bytes:
        """The body, also where the client frames it in chunks with checksums behind."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        content, rest = b"", body
        while True:
            head, _, rest = rest.partition(b"\r\n")
            if not (size := int(head.split(b";")[0], 16)):
                return content
            content, rest = content + rest[:size], rest[size + 2 :]

    def find(self) -> bytes | None:
        if self.begin():
            return None
        self.path = self.path.partition("?")[0]
        content = self.server.objects.get(self.path)
        if content is None:
            if self.path.strip("/").count("/"):
                self.refuse(404, "NoSuchKey")
            else:  # a listing, which nothing is in
                self.answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        return content

    def begin(self) -> bool:
        """Note the request; whether it has been dealt with, wrongly."""
        self.server.asked.append((self.command, self.path))
        word = self.server.behaviour(self.command, self.path)
        if word:
            self.misbehave(word)
        return bool(word)

    def misbehave(self, word: str) -> None:
        content = self.server.objects.get(self.path.partition("?")[0], b"")
        if word == "hang":
            time.sleep(60)
        elif word == "denied":
            self.refuse(403, "AccessDenied")
        elif word == "broken":
            self.refuse(500, "InternalError")
        elif word == "flip":
            self.answer(200, content[:-1] + bytes([content[-1] ^ 1]) if content else b"?")
        elif word == "short":
            self.answer(200, content[:-1])
        elif word == "cut":
            self.answer(200, content[: len(content) // 2], length=len(content) + 1)
        elif word == "endless":
            self.answer(200, b"", length=10 << 30)
            self.pour(10 << 30)
        elif word == "gone":
            self.refuse(404, "NoSuchKey")
        self.close_connection = True

    def pour(self, size: int) -> None:
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            self.wfile.write(block)
            self.server.sent += len(block)

    def answer(self, status: int, content: bytes, body: bool = True, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("ETag", '"0"')
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)
            self.server.sent += len(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}, it says</Message></Error>".encode())

    def log_message(self, *arguments: object) -> None:
        """Quiet."""
