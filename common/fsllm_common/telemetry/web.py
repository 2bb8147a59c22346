"""The small web port of both ends: /metrics, /healthz and /readyz, in one thread of its own.

It answers GET only, from a registry and a list of checks: there is nothing here to log in to.
"""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from fsllm_common.errors import Unavailable

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Check = Callable[[], str | None]
"""Returns what is wrong in one line, or None. Runs in the web thread, so it must be thread-safe and quick."""


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds; a peer that sends no request frees its thread

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Keep scrapes out of the log."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a peer that sends no request in time or goes away: it is no error of this side."""


class WebServer:
    """Serves /metrics, /healthz (the process lives) and /readyz (every check passes) until ``stop``."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: Iterable[Check]) -> None:
        """Bind at once, so that a taken port is told before anything starts.

        Raises:
            Unavailable: PORT_IN_USE.

        """
        self._metrics = make_wsgi_app(registry)
        self._checks = tuple(checks)
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            raise Unavailable(
                "PORT_IN_USE", f"--metrics-port: {host}:{port} can not be opened: {error.strerror}"
            ) from error
        self._server.set_app(self._answer)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, text = "405 Method Not Allowed", "Only GET."
        elif path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start)
            return answer
        elif path == "/healthz":
            status, text = "200 OK", "alive"
        elif path == "/readyz":
            wrong = [line for check in self._checks if (line := check()) is not None]
            status, text = ("503 Service Unavailable", "\n".join(wrong)) if wrong else ("200 OK", "ready")
        else:
            status, text = "404 Not Found", "There are /metrics, /healthz and /readyz."
        body = text.encode() + b"\n"
        start(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [body]
