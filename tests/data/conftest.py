"""A web server on the loopback that fails as servers do, and small sources for the tests of the data layer."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from medclip.data.cache import BlockCache
from medclip.data.storage import Storage


class Server:
    """Serves byte ranges of `files`; `fail(n, path)` names what goes wrong with the n-th request (from 0), if anything.

    Failures: an HTTP status, "reset", "short" (the body ends early), "whole" (200 with everything), "shifted" (another
    range than asked for), "redirect" (to /signed/…), "slow".
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fail: Callable[[int, str], object] = lambda number, path: None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answered: Counter[object] = Counter()
        self.retry_after = "0"
        self.redirect_to = ""
        self.tag: str | None = '"one"'
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 20  # header and body in one packet, or each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        with self._lock:
            number = len(self.requests)
            self.requests.append((request.path, dict(request.headers)))
            failure = self.fail(number, request.path)
            self.answered[failure] += 1
        if failure == "reset":
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        if failure == "redirect":
            self._send(request, 302, b"", {"Location": f"{self.redirect_to or self.url}/signed{path}?sig=secret"})
            return
        if isinstance(failure, int):
            headers = {"Retry-After": self.retry_after} if failure in (429, 503) else {}
            self._send(request, failure, b"no", headers)
            return
        content = self.files.get(path.removeprefix("/signed"))
        if content is None:
            self._send(request, 404, b"", {})
            return
        if failure == "slow":
            time.sleep(1.5)
        first, last = (int(x) for x in request.headers["Range"].removeprefix("bytes=").split("-"))
        if failure == "whole":
            self._send(request, 200, content, {})
            return
        if first >= len(content):
            self._send(request, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if failure == "shifted":
            first, last = 0, last - first
        body = content[first : last + 1]
        headers = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(content)}"}
        if self.tag is not None:
            headers["ETag"] = self.tag
        if failure == "short":
            self._send(request, 206, body[: len(body) // 2], headers, promised=len(body))
            request.close_connection = True
            return
        self._send(request, 206, body, headers)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        promised: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body) if promised is None else promised))
        request.end_headers()
        request.wfile.write(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def now_and_then(share: float = 0.4, seed: int = 0) -> Callable[[int, str], object]:
    """A bad day: this share of the requests fails, in every way."""
    rng = random.Random(seed)
    kinds = (429, 503, 500, "reset", "short", "whole", "shifted")
    return lambda number, path: rng.choice(kinds) if rng.random() < share else None


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def other_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def remote(tmp_path: Path) -> Storage:
    """Storage with a small cache that does not wait long between attempts."""
    return Storage(BlockCache(tmp_path / "blocks", 0.01, 4096), tries=12, backoff=0.001, timeout=5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
