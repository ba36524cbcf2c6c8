"""Lambda's runtime API and a bucket of S3, small but spoken to over real sockets by the real clients."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


def aws_variables(runtime_api: str, s3_url: str) -> dict[str, str]:
    """Environment of a function that finds both emulators."""
    return {
        "AWS_LAMBDA_RUNTIME_API": runtime_api,
        "AWS_ENDPOINT_URL_S3": s3_url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class LambdaService:
    """Hands events to a runtime and takes its answers."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.answers: queue.Queue[tuple[str, str, Any]] = queue.Queue()
        self.waiting = threading.Event()
        self.address = ""
        self._count = 0

    def invoke(self, event: Any, timeout_s: float = 120) -> tuple[str, Any]:
        """("response" or "error", body) of one event."""
        self._count += 1
        request_id = f"request-{self._count}"
        self.events.put((request_id, event))
        found_id, kind, body = self.answers.get(timeout=timeout_s)
        assert found_id == request_id
        return kind, body


class Bucket:
    """Objects by bucket and key."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fail_next = 0
        self.url = ""


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body leave in two writes; the second would wait for an ACK

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def lambda_service() -> Iterator[LambdaService]:
    """The runtime API at `address`."""
    service = LambdaService()

    class Handler(_Quiet):
        def do_GET(self) -> None:
            assert self.path == "/2018-06-01/runtime/invocation/next"
            service.waiting.set()
            request_id, event = service.events.get()
            self.reply(200, json.dumps(event).encode(), Lambda_Runtime_Aws_Request_Id=request_id)

        def do_POST(self) -> None:
            body = json.loads(self.content())
            *_, request_id, kind = self.path.split("/")
            self.reply(202, b"{}")
            service.answers.put((request_id, kind, body))

    with _served(Handler) as address:
        service.address = address
        yield service


@contextmanager
def bucket() -> Iterator[Bucket]:
    """An S3 endpoint with path-style addresses: GET (ranges too), HEAD and PUT."""
    store = Bucket()

    class Handler(_Quiet):
        def key(self) -> str:
            return unquote(self.path.partition("?")[0]).lstrip("/")

        def do_GET(self) -> None:
            if store.fail_next:
                store.fail_next -= 1
                self.reply(503, b"<Error><Code>SlowDown</Code></Error>")
            elif self.key() not in store.objects:
                self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            else:
                self.found(store.objects[self.key()])

        def found(self, whole: bytes) -> None:
            status, part = 200, whole
            more = {"ETag": '"1"', "Last_Modified": "Thu, 12 Mar 2026 19:03:58 GMT"}
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                status, part = 206, whole[int(first) : int(last or len(whole) - 1) + 1]
                more["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"
            self.reply(status, part, **more)

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            assert self.headers["Authorization"].startswith("AWS4-HMAC-SHA256")
            store.objects[self.key()] = self.content()
            self.reply(200, ETag='"1"')

    with _served(Handler) as address:
        store.url = f"http://{address}"
        yield store
