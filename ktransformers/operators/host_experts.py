"""Routed experts that the CPU computes for tokens on a GPU, while the GPU goes on.

`HostExperts.start` copies a step's tokens to pinned memory and has the stream call the C library's queue; `Started.end`
has the stream wait for the result and copies it back. Both only enqueue: no thread waits for the GPU, so that a step
can be captured as a graph, and what is enqueued between the two runs beside the CPU.

Pinned memory is made once for each number of tokens, shared by the layers of a device, which follow one another, and
never given back: a graph holds its addresses.
Letters: T tokens, H hidden, K experts per token.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ktransformers import native
from ktransformers.errors import DeviceError
from ktransformers.machine.streams import Streams, streams_of

MOST_TOKENS = 64
"""Larger steps are copied and waited for: their work is long beside a wait, and every size has memory of its own."""


@dataclass
class Pinned:
    """Where one step's tokens go, and its result."""

    hidden: Tensor  # [T, H]
    ids: Tensor  # int64 [T, K]
    weights: Tensor  # float32 [T, K]
    out: Tensor  # [T, H]


class Host:
    """The queue and the pinned memory that all layers of a device share."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.queue = streams, native.Queue()
        self.synced = self.queue.host_sync()
        self._pinned: dict[tuple, Pinned] = {}
        self._kept: list[dict[int, native.HostCall]] = []

    def pinned(self, tokens: int, hidden: int, per_token: int, dtype: torch.dtype) -> Pinned:
        """The memory of steps of this size. Raises DeviceError for a new size while a graph is captured."""
        size = tokens, hidden, per_token, dtype
        if size not in self._pinned:
            if self.streams.is_capturing():
                raise DeviceError(
                    f"experts on the host: found a first step of {tokens} tokens while a graph is captured, expected "
                    "memory for it: compute one such step before."
                )
            new = self.streams.pinned
            self._pinned[size] = Pinned(
                new(tokens, hidden, dtype=dtype), new(tokens, per_token, dtype=torch.int64),
                new(tokens, per_token, dtype=torch.float32), new(tokens, hidden, dtype=dtype),
            )  # fmt: skip
        return self._pinned[size]

    def check(self) -> None:
        """Raise what went wrong on the CPU since the last time. Waits for nothing; after `Streams.wait` it is all."""
        self.queue.sync(1 << 62)


    def let_go(self, calls: dict[int, native.HostCall]) -> None:
        """No layer needs these any more; the stream may."""
        if not self.streams.is_capturing():
            self.streams.wait()
        else:
            self._kept.append(calls)


_hosts: dict[Streams, Host] = {}


def host_of(streams: Streams) -> Host:
    """The one of a device's streams, for as long as the program runs."""
    if streams not in _hosts:
        _hosts[streams] = Host(streams)
    return _hosts[streams]


def finish(device: torch.device) -> None:
    """Wait for the current stream of `device` where experts on the host may be at work, and raise what went wrong.

    Before a step's results are used: a failed layer left old values in its memory, and the GPU went on with them.
    """
    streams = streams_of(device)
    if streams in _hosts and not streams.is_capturing():
        streams.wait()
        _hosts[streams].check()


@dataclass
class Started:
    """A step that the CPU computes. It keeps its tensors: the stream reads them later."""

    host: Host
    pinned: Pinned
    out: Tensor
    kept: tuple[Tensor, ...]

    def end(self) -> Tensor:
        """The result [T, H], on the GPU, where the current stream has it from here on."""
        streams = self.host.streams
        with streams.aside():
            streams.host(self.host.synced)
            self.out.copy_(self.pinned.out, non_blocking=True)
        streams.join()
        return self.out


class HostExperts:
    """One layer's experts. For one thread."""

    def __init__(self, experts: native.Experts, streams: Streams) -> None:
        self._experts, self._host = experts, host_of(streams)
        self._calls: dict[int, native.HostCall] = {}  # by the address of the memory that they read
        weakref.finalize(self, self._host.let_go, self._calls).atexit = False

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Started:
        """Enqueue hidden [T, H], ids [T, K], weights [T, K] on the current stream; T at most MOST_TOKENS.

        Raises NativeError, with the layer's name, for what went wrong in steps before, unless a graph is captured.
        """
        host, streams = self._host, self._host.streams
        if not streams.is_capturing():
            host.check()
        pinned = host.pinned(*hidden.shape, ids.shape[1], hidden.dtype)
        call = self._call(pinned)
        given = hidden, ids.to(torch.int64), weights.to(torch.float32)
        out = torch.empty_like(hidden)
        with streams.aside():
            for mine, theirs in zip((pinned.hidden, pinned.ids, pinned.weights), given, strict=True):
                mine.copy_(theirs, non_blocking=True)
            streams.host(call)
        return Started(host, pinned, out, given)

    def _call(self, pinned: Pinned) -> native.HostCall:
        at = pinned.hidden.data_ptr()
        if at not in self._calls:
            self._calls[at] = self._host.queue.host_submit(
                self._experts, pinned.hidden, pinned.ids, pinned.weights, pinned.out
            )
        return self._calls[at]
