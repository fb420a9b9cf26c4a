"""The process of a peer: it keeps the weights and answers over a pipe, so that thread pools do not mix.

Start it as `python -m tests.bench.peers.NAME FD`. A peer subclasses Peer and ends its module with `serve(Class)`.
Nothing is printed; an exception inside a request is its answer.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tests.bench.peers.work import CHECKED, Case, Work

PR_SET_PDEATHSIG = 1
LONG = 0.5  # seconds of a call


class Missing(Exception):
    """This peer does not have the format, or cannot run it here; the text says why."""


class Peer:
    """What serve() needs. Construction loads nothing."""

    def load(self, work: Work) -> str:
        """Take the weights; returns a word on what runs (a class, a variant). Raises Missing."""
        raise NotImplementedError

    def prepare(self, case: Case) -> str:
        """Take the activations and routings of the next calls; returns a word on what runs, or ""."""
        raise NotImplementedError

    def call(self, layer: int, draw: int) -> None:
        """One layer of one draw, from activations in memory to outputs in memory."""
        raise NotImplementedError

    def output(self) -> np.ndarray:
        """[T, H] float32 of the last call."""
        raise NotImplementedError


class Server:
    def __init__(self, peer: Peer) -> None:
        self.peer, self.count, self.last = peer, 0, 0.0
        self.work: Work
        self.case: Case

    def load(self, path: str) -> str:
        with open(path, "rb") as file:
            self.work = pickle.load(file)
        return self.peer.load(self.work)

    def prepare(self, path: str) -> tuple[str, np.ndarray, float]:
        """Returns the peer's word, the outputs to check, and the seconds of a call that is not the first."""
        with open(path, "rb") as file:
            self.case = pickle.load(file)
        word = self.peer.prepare(self.case)
        start = time.perf_counter()
        self.peer.call(0, 0)
        self.last = time.perf_counter() - start
        out = np.array(self.peer.output()[:CHECKED], dtype=np.float32)
        return word, out, self.last if self.last > LONG else self._one()

    def run(self, seconds: float) -> tuple[list[float], float]:
        """Calls for `seconds`, at least one, after one that wakes the threads (not where waking is nothing beside a
        call). Returns their times and the CPU time."""
        if self.last < LONG:
            self._one()
        times: list[float] = []
        start, cpu = time.perf_counter(), time.process_time()
        while not times or time.perf_counter() - start < seconds:
            times.append(self._one())
        return times, time.process_time() - cpu

    def _one(self) -> float:
        self.count += 1
        layer, draw = self.count % self.work.layers, self.count % len(self.case.draws)
        start = time.perf_counter()
        self.peer.call(layer, draw)
        self.last = time.perf_counter() - start
        return self.last


def serve(peer: type[Peer]) -> None:
    """Answer requests on the socket whose number is the first argument until it closes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pipe = Connection(int(sys.argv[1]))
    server: Any = Server(peer())
    while True:
        try:
            name, *arguments = pipe.recv()
        except EOFError:
            break
        handler = getattr(server, name, None) or getattr(server.peer, name)
        try:
            pipe.send(("ok", handler(*arguments)))
        except Missing as error:
            pipe.send(("missing", str(error)))
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}"))
    os._exit(0)  # some peers' pools do not end in order
