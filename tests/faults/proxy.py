"""A proxy on loopback between a client and a tracking server, which does what bad networks do."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# The fault of a request, by its number (from 1), method and path; empty for none.
Rule = Callable[[int, str, str], str]
REFUSED = ("500", "429", "503")  # answered in the server's place
FAULTS = ("drop", "lose", "cut", "delay", *REFUSED)
DELAY = 1.0  # seconds
KEPT = ("content-type", "authorization", "accept", "x-mlflow-workspace")


def none(number: int, method: str, path: str) -> str:
    """No fault."""
    return ""


def every(n: int, fault: str) -> Rule:
    """That fault at every n-th request."""
    return lambda number, method, path: fault if number % n == 0 else ""


def first(fault: str, method: str, end: str, times: int = 1) -> Rule:
    """That fault at the first so many requests of a method whose path ends like this."""
    left = itertools.count(1)

    def rule(number: int, asked: str, path: str) -> str:
        return fault if asked == method and path.endswith(end) and next(left) <= times else ""

    return rule


class Proxy:
    """Forwards to a server, but for the faults of its rule.

    `drop`: the connection ends before the server is asked. `lose`: the server has done what it was
    asked, and the connection ends before the answer. `cut`: half of the answer comes. `delay`: it
    comes late. `500`, `429`, `503`: the answer, without asking the server. `late`: the connection
    ends, and the server does what it was asked at `catch_up`.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.rule: Rule = none
        self.number = 0
        self.faults: Counter[str] = Counter()
        self._late: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._served = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._served.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._served.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._served.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._served.shutdown()
        self._served.server_close()

    def late(self, act: Callable[[], object]) -> None:
        """Have something done at `catch_up`."""
        self._late.append(act)

    def catch_up(self) -> int:
        """Let the server do what it was asked when nobody waits any more; how many requests."""
        done, self._late = self._late, []
        for act in done:
            act()
        return len(done)

    def fault(self, method: str, path: str) -> str:
        """Count a request; its fault."""
        with self._lock:
            self.number += 1
            fault = self.rule(self.number, method, path)
            self.faults[fault or "none"] += 1
            return fault


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test's output is its own."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            fault = proxy.fault(self.command, self.path)
            if fault in ("drop", "late"):
                if fault == "late":
                    proxy.late(lambda: self.forwarded(body))
                self.close_connection = True
                return
            if fault in REFUSED:
                status, kind, content = int(fault), "text/plain", b"a fault on purpose"
            else:
                status, kind, content = self.forwarded(body)
            if fault == "delay":
                time.sleep(DELAY)
            if fault == "lose":
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.close_connection = fault == "cut"
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

        def forwarded(self, body: bytes) -> tuple[int, str, bytes]:
            headers = {k: v for k, v in self.headers.items() if k.lower() in KEPT}
            host = urlsplit(proxy.server).netloc
            with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as server:
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                return answer.status, answer.getheader("content-type", ""), answer.read()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    return Handler
