"""Calls that a thread of C's own computes while Python goes on or a GPU works, and their host functions for CUDA."""

from __future__ import annotations

from typing import Any

import torch

from ktransformers.errors import NativeError
from ktransformers.native.checks import DTYPES, check_pinned, checked_input, checked_output, whole_number
from ktransformers.native.experts import Experts
from ktransformers.native.library import Pool, State, pooled
from ktransformers.native.linear import Linear


class HostCall:
    """A call for cudaLaunchHostFunc: addresses of a `void (*)(void *)` and of its argument. Both stay valid as long as
    this object, which must outlive the graph that holds it."""

    def __init__(self, function: Any, argument: Any, keep: Any, state: State) -> None:
        self._keep = function, argument, keep
        self.function = int(state.ffi.cast("uintptr_t", function))
        self.argument = int(state.ffi.cast("uintptr_t", argument))


class _Submitted:
    """What a call needs until it is done. The number is None until the library has taken it."""

    def __init__(self, name: str, keep: Any) -> None:
        self.name, self.keep, self.number = name, keep, None


class Queue:
    """Calls that a thread of the queue's own computes in order, while Python goes on or a GPU works.

    For steps that overlap with a GPU (operators/host_experts.py).
    Thread-safe. `close`, or the end of the object, waits for the call being computed and drops those after it.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        """`pool`: whose threads compute; None: the module's own."""
        if pool is not None and not isinstance(pool, Pool):
            raise NativeError(f"Queue: found {type(pool).__name__}, expected a Pool, or None.")
        state, handle = pooled() if pool is None else (pool._state, pool._pool)
        out = state.ffi.new("kt_queue **")
        state.check(state.lib.kt_queue_create(handle, out), "Queue")
        submitted: dict[_Submitted, None] = {}  # in order; adding and removing are atomic

        def destroy(queue: Any) -> None:
            state.lib.kt_queue_destroy(queue)
            submitted.clear()  # not before: the library may have been reading them
            _ = handle  # the pool ends after the queue

        self._state, self._submitted, self._closed = state, submitted, False
        self._names: dict[int, str] = {}  # of host functions, by the tags of their calls
        self._queue = state.ffi.gc(out[0], destroy)  # threads inside calls and host functions hold it as well

    def submit(
        self, experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute `out[:] = experts(hidden, ids, weights)` later. `out` [T, H]: contiguous, hidden's dtype, on the cpu.

        Leave the tensors alone until `sync`. Raises NativeError for arguments that do not fit.
        """
        self._submit(*self._experts_call(experts, hidden, ids, weights, out))

    def submit_linear(self, linear: Linear, x: torch.Tensor, out: torch.Tensor) -> None:
        """Compute `out[:] = linear(x)` later; otherwise as `submit`."""
        self._submit(*self._linear_call(linear, x, out))

    def sync(self, allow_pending: int = 0) -> None:
        """Wait until at most `allow_pending` of the calls submitted so far are unfinished.

        Raises NativeError with the name of the first call that failed since the last sync; the others are computed.
        """
        whole_number(allow_pending, 0, 2**62, "Queue.sync (allow_pending)")
        state, queue = self._state, self._open()
        failed, tag = state.ffi.new("int64_t *"), state.ffi.new("int64_t *")
        status = state.lib.kt_sync(queue, allow_pending, failed, tag)
        done = state.lib.kt_queue_done(queue)
        name = self._names.get(tag[0]) or f"queue, call {failed[0] or 'not submitted'}"
        for entry in list(self._submitted):
            if entry.number is not None and entry.number <= done:
                name = entry.name if entry.number == failed[0] else name
                self._submitted.pop(entry, None)
        state.check(status, name)

    def host_submit(
        self, experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> HostCall:
        """`submit` as a host function that may run many times. It reads these very tensors each time, so all must be
        contiguous on the cpu, ids int64 and weights float32; where there is a CUDA device also pinned, as a stream's
        copies from and to other memory are not asynchronous."""
        name, call, keep = self._experts_call(experts, hidden, ids, weights, out)
        for role, mine, read in (("hidden", hidden, keep[1]), ("ids", ids, keep[2]), ("weights", weights, keep[3])):
            if mine.data_ptr() != read.data_ptr():
                raise NativeError(
                    f"{name} ({role}): found {mine.dtype} on {mine.device}, contiguous={mine.is_contiguous()}; "
                    f"expected {read.dtype}, contiguous, on the cpu: a host function reads it each time it runs."
                )
        check_pinned({"hidden": hidden, "ids": ids, "weights": weights, "out": out}, name)
        keep = (self._queue, keep)
        call.tag = len(self._names) + 1
        self._names[call.tag] = name
        return HostCall(self._state.ffi.addressof(self._state.lib, "kt_submit_host"), call, keep, self._state)

    def host_sync(self, allow_pending: int = 0) -> HostCall:
        """`sync` as a host function. What failed is raised by the next `sync`."""
        whole_number(allow_pending, 0, 2**62, "Queue.host_sync (allow_pending)")
        wait = self._state.ffi.new("kt_wait *", {"queue": self._open(), "allow_pending": allow_pending})
        return HostCall(self._state.ffi.addressof(self._state.lib, "kt_sync_host"), wait, self._queue, self._state)

    def close(self) -> None:
        """End the queue now. A `sync` under way in another thread raises NativeError if calls it waits for are dropped.

        Calling it twice is fine; any other use of a closed queue raises NativeError, and host functions do nothing."""
        self._closed = True
        self._state.lib.kt_queue_close(self._queue)
        self._submitted.clear()

    def _open(self) -> Any:
        if self._closed:
            raise NativeError("Queue: found it closed, expected an open one. Make a new Queue.")
        return self._queue

    def _submit(self, name: str, call: Any, keep: Any) -> None:
        entry, number = _Submitted(name, keep), self._state.ffi.new("int64_t *")
        self._submitted[entry] = None  # first, so that Ctrl-C at any moment leaves the tensors alive
        status = self._state.lib.kt_submit(call, number)
        if status:
            self._submitted.pop(entry, None)
        self._state.check(status, name)
        entry.number = number[0]

    def _experts_call(self, experts: Experts, hidden: Any, ids: Any, weights: Any, out: Any) -> tuple[str, Any, Any]:
        if not isinstance(experts, Experts):
            raise NativeError(f"Queue: found {type(experts).__name__}, expected Experts.")
        state, name, cast = self._state, experts.name, self._state.ffi.cast
        hidden, ids, weights = experts.arguments(hidden, ids, weights)
        checked_output(out, hidden, [hidden.shape[0], experts.hidden], name)
        call = state.ffi.new("kt_call *", {
            "queue": self._open(), "experts": experts.handle, "ids": cast("int64_t *", ids.data_ptr()),
            "per_token": ids.shape[1], "weights": cast("float *", weights.data_ptr()),
            "input": cast("void *", hidden.data_ptr()), "dtype": DTYPES[hidden.dtype],
            "tokens": hidden.shape[0], "out": cast("void *", out.data_ptr()),
        })  # fmt: skip
        return name, call, (experts, hidden, ids, weights, out)

    def _linear_call(self, linear: Linear, x: Any, out: Any) -> tuple[str, Any, Any]:
        if not isinstance(linear, Linear):
            raise NativeError(f"Queue: found {type(linear).__name__}, expected Linear.")
        state, name, cast = self._state, linear.name, self._state.ffi.cast
        x = checked_input(x, linear.in_features, name)
        checked_output(out, x, [*x.shape[:-1], linear.out_features], name)
        bias = state.ffi.NULL if linear.bias is None else cast("float *", linear.bias.data_ptr())
        call = state.ffi.new("kt_call *", {
            "queue": self._open(), "weight": linear.packed, "bias": bias, "input": cast("void *", x.data_ptr()),
            "dtype": DTYPES[x.dtype], "tokens": x.numel() // linear.in_features,
            "out": cast("void *", out.data_ptr()),
        })  # fmt: skip
        return name, call, (linear, x, out)
