"""What a program asks of a GPU besides computing: streams, graphs, pinned memory, host functions.

The one place that calls CUDA for them, or HIP, whose torch goes by the same names; kernels are kernels/. Tests register
a stand-in that fails where CUDA would (tests/simulated_gpu.py): whoever asks here runs on it as it is.

A host function is a C function that a stream calls when its turn comes: its address and its argument's, as numbers. It
must not call CUDA, and must not be Python's: the driver's thread would wait for the interpreter's lock, which a thread
that waits for the stream may hold (CUDA runtime API, cudaLaunchHostFunc).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ktransformers.errors import DeviceError, UnsupportedError


class HostFunction(Protocol):
    """Addresses of a ``void (*)(void *)`` and of its argument; native.HostCall is one."""

    function: int
    argument: int


class Graph(Protocol):
    """Work that was captured, to be done again with what its memory holds then."""

    def replay(self) -> None: ...


class Streams(Protocol):
    """Streams of one device. Work on one is done in order; `aside` says what may be done beside it."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that a stream copies from and to without waiting. Not while a graph is captured."""
        ...

    def host(self, function: HostFunction) -> None:
        """Have the current stream call `function`, which must outlive the work and every graph that holds it."""
        ...

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """What is enqueued inside comes after what the current stream has so far, and beside what it gets next."""
        ...

    def join(self) -> None:
        """The current stream waits for all that was enqueued aside."""
        ...

    def wait(self) -> None:
        """Wait for all work of the current stream."""
        ...

    def is_capturing(self) -> bool:
        """Whether the current stream captures a graph."""
        ...

    def capture(self) -> contextlib.AbstractContextManager[Graph]:
        """What is enqueued inside is captured, not done; the value is good when the block has ended without error."""
        ...


_registered: dict[torch.device, Streams] = {}


def streams_of(device: torch.device) -> Streams | None:
    """The streams of `device`; None where it has none, as the CPU, or no host functions can be found."""
    if device not in _registered and device.type == "cuda" and torch.cuda.is_available() and _launcher() is not None:
        _registered[device] = CudaStreams(device)
    return _registered.get(device)


@contextlib.contextmanager
def registered(device: torch.device, streams: Streams) -> Iterator[Streams]:
    """Inside, `streams` are those of `device`."""
    before = _registered.get(device)
    _registered[device] = streams
    try:
        yield streams
    finally:
        _registered.pop(device)
        if before is not None:
            _registered[device] = before


class CudaStreams:
    """Of a CUDA or HIP device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if self.is_capturing():
            raise DeviceError(f"pinned memory {list(shape)}: found a graph being captured; allocate before.")
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)

    def host(self, function: HostFunction) -> None:
        launch = _launcher()
        if launch is None:
            raise UnsupportedError("host functions: found no cuLaunchHostFunc, nor HIP's. Update the GPU's driver.")
        stream = torch.cuda.current_stream(self.device).cuda_stream
        if status := launch(stream, function.function, function.argument):
            raise DeviceError(f"host function: {self.device} refused it with error {status} of the driver.")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._side)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a thread that reads weights may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            yield graph


_CUDA, _HIP = ("libcuda.so.1", "cuLaunchHostFunc"), ("libamdhip64.so", "hipLaunchHostFunc")
_found: dict[str, Any] = {}


def _launcher() -> Any:
    """The driver's function that enqueues a host function, (stream, function, argument) -> status; None without one."""
    if not _found:
        library, name = _HIP if torch.version.hip else _CUDA
        try:
            function = getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            function = None
        else:  # else a handle of 64 bits is cut to 32
            function.argtypes, function.restype = [ctypes.c_void_p] * 3, ctypes.c_int
        _found["launch"] = function
    return _found["launch"]
