"""uvicorn around the application: a socket, the model loaded behind it, signals, and an end that loses nothing."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ktransformers.errors import KTransformersError
from ktransformers.server.app import create_app
from ktransformers.server.middleware import log
from ktransformers.server.service import Served, Service

_BACKLOG = 2048
"""Connections that the system keeps until they are taken: a thousand may come at once."""

_FILES = 65536
"""Files to have open where the system lets us: each connection is one."""

_KEEP_ALIVE = 75
"""Seconds; longer than clients keep their connections, so that it is they who let go."""

_AFTER_DRAIN = 5
"""Seconds in which answers that were cut off are told so."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises KTransformersError for an address that cannot be had."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        step = "Choose another --host or --port."
        raise KTransformersError(f"{host}:{port}: cannot be listened on: {reason}. {step}") from error


def url_of(bound: socket.socket) -> str:
    """How clients on this machine name a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Answers on `bound` until a signal, or `should_exit`, ends it.

    SIGTERM and Ctrl-C: no new requests; those that were taken end within `drain_seconds`, or are told that they do not.
    A second one ends at once. SIGHUP: API keys are read again.
    """

    def __init__(self, service: Service, bound: socket.socket, drain_seconds: float = 30.0) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service), log_config=None, access_log=False, http="h11", ws="none", loop="asyncio",
                lifespan="off", proxy_headers=False, server_header=False, timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=round(drain_seconds) + _AFTER_DRAIN, backlog=_BACKLOG,
            )
        )  # fmt: skip
        self.service, self._bound, self._drain_seconds = service, bound, drain_seconds
        self._failure: BaseException | None = None

    def answer(self, open_model: Callable[[], Served]) -> None:
        """Answer while `open_model` loads the model in a thread, and then with it. Raises what that raises."""
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        loader = threading.Thread(target=self._open, args=(open_model,), name="loader", daemon=True)
        loader.start()
        _allow_many_files()
        with self._bound:
            self.run(sockets=[self._bound])
        self.service.close()
        if self._failure is not None:
            raise self._failure

    def _open(self, open_model: Callable[[], Served]) -> None:
        try:
            served = open_model()
        except BaseException as error:
            self._failure, self.should_exit = error, True
            return
        if self.should_exit:
            served.engine.close()
            served.after()
        else:
            self.service.served = served
            log.info("ready: %s", ", ".join(self.service.names()))

    # ---- signals -------------------------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP"):
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload_keys)

    def reload_keys(self) -> None:
        """Read the API keys again. Where that fails those before stay in force."""
        try:
            log.info("API keys: %d", self.service.keys.reload())
        except KTransformersError as error:
            log.error("API keys are as before: %s", error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn raises the signals that it caught once more; SIGTERM would then be a violent end."""
        if sig == signal.SIGINT:
            super().handle_exit(sig, frame)
        elif self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().run_in_executor(None, self._end_engine)
        await super().shutdown(sockets)
        await ending

    def _end_engine(self) -> None:
        """Let answers end, as long as they may take, then end them."""
        if self.service.served is None:
            return
        engine, until = self.service.served.engine, time.monotonic() + self._drain_seconds
        while not self.force_exit and (left := until - time.monotonic()) > 0:
            if engine.drain(min(0.25, left)):
                break
        engine.close()
        self.service.served.after()


def _allow_many_files() -> None:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
