"""The loaded C library, its one thread pool, and what can be set and asked about both.

Importing this starts no thread and works without the library being built: the first use then says what to do.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch

from ktransformers import env
from ktransformers.errors import NativeError, did_you_mean
from ktransformers.native.checks import MAX_THREADS, check_bytes, whole_number

NOT_BUILT = "the C library is not built or does not load; run `make setup` in the checkout"
"""What to say where `available()` is false."""

_lock = threading.RLock()
_state: Any = None


def _module() -> Any:
    try:
        from ktransformers import _native
    except ImportError as error:
        raise NativeError(f"ktransformers._native, which an installed wheel contains: {error}; {NOT_BUILT}.") from error
    return _native


class State:
    """The loaded module and the one pool. Made at first use."""

    def __init__(self) -> None:
        module = _module()
        self.ffi, self.lib = module.ffi, module.lib
        self.pool: Any = None
        ids = [i for i in (*range(64), *range(1000, 1016)) if self.lib.kt_type_name(i)]
        self.type_ids = {self.text(self.lib.kt_type_name(i)): i for i in ids}
        wanted = env.isa()
        if wanted is not None:
            self.force(wanted, "KT_ISA")

    def text(self, pointer: Any) -> str:
        return self.ffi.string(pointer).decode("ascii")

    def isas(self) -> list[str]:
        lib = self.lib
        return [self.text(lib.kt_isa_name(i)) for i in range(lib.kt_isa_count()) if lib.kt_isa_usable(i)]

    def force(self, name: str, subject: str) -> None:
        usable = self.isas()
        if not isinstance(name, str) or name not in usable:
            raise NativeError(
                f"{subject}={name!r}: not an instruction set of this machine{did_you_mean(str(name), usable)}. "
                f"Usable here, lowest first: {', '.join(usable)}."
            )
        self.check(self.lib.kt_isa_force(name.encode()), f"{subject}={name!r}")

    def new_pool(self, count: int, pin: bool, numa: str | None) -> Any:
        out = self.ffi.new("kt_pool **")
        nodes = self.ffi.NULL if numa is None else numa.encode()
        status = self.lib.kt_pool_create_on(count, pin, nodes, out)
        self.check(status, f"thread pool of {count or 'default'} threads on {numa or 'the machine'}")
        # Whoever is inside a call holds a reference, so a pool ends when its last call does.
        return self.ffi.gc(out[0], self.lib.kt_pool_destroy)

    def check(self, status: int, subject: str) -> None:
        if status != self.lib.KT_OK:
            raise NativeError(f"{subject}: {self.text(self.lib.kt_status_message(status))}.")


def loaded() -> State:
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = State()
    return _state


def pooled() -> tuple[State, Any]:
    state = loaded()
    if state.pool is None:
        with _lock:
            if state.pool is None:
                state.pool = state.new_pool(env.threads() or 0, env.pin(), env.numa())
    return state, state.pool


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it; the pool mends itself (threads.c)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available() -> bool:
    """Whether the C library is built and loads. Whether KT_ISA and KT_THREADS make sense shows at first use."""
    try:
        _module()
    except NativeError:
        return False
    return True


def isas() -> list[str]:
    """Instruction sets that this machine can run, lowest first, from "portable" on."""
    return loaded().isas()


def isa_needs() -> dict[str, tuple[str, ...]]:
    """Every instruction set that the library knows, lowest first -> the features of the processor that it needs."""
    state = loaded()
    lib, names = state.lib, list(cpu_features())
    return {
        state.text(lib.kt_isa_name(i)): tuple(n for bit, n in enumerate(names) if lib.kt_isa_needs(i) >> bit & 1)
        for i in range(lib.kt_isa_count())
    }


def isa() -> str:
    """The instruction set in use."""
    state = loaded()
    return state.text(state.lib.kt_isa_name(state.lib.kt_isa_active()))


def set_isa(name: str) -> None:
    """Use instruction set `name` from now on, one of `isas()`. Raises NativeError for any other."""
    loaded().force(name, "instruction set")


def default_threads() -> int:
    """Threads that suit this process: its cores, one thread each, within what affinity and cgroup grant."""
    return loaded().lib.kt_default_threads()


def threads() -> int:
    """Threads of the pool, the calling one included. Makes the pool, but starts no thread."""
    state, pool = pooled()
    return state.lib.kt_pool_threads(pool)


def nodes() -> list[int]:
    """Threads of the pool on each NUMA node that it knows; one number where there is one node."""
    state, pool = pooled()
    return [state.lib.kt_pool_node_threads(pool, n) for n in range(state.lib.kt_pool_nodes(pool))]


def set_threads(count: int | None) -> None:
    """Use `count` threads from now on, the calling one included; None: KT_THREADS or the machine's cores.

    Waits for the calls under way. Raises NativeError for what is not a whole number from 1 to MAX_THREADS.
    """
    if count is not None:
        whole_number(count, 1, MAX_THREADS, "set_threads", ", or None")
    state, pool = pooled()
    state.check(state.lib.kt_pool_resize(pool, count or env.threads() or 0), f"set_threads({count})")


def scratch_bytes() -> int:
    """Bytes of scratch memory that the pool holds: what its largest call needed, whatever the number of layers."""
    state, pool = pooled()
    return state.lib.kt_pool_scratch_bytes(pool)


def cpu_features() -> dict[str, bool]:
    """Features of the processor that the operating system enables too, by name."""
    state = loaded()
    bits, found = state.lib.kt_cpu_features(), {}
    for bit in range(32):
        name = state.lib.kt_cpu_feature_name(bit)
        if name:
            found[state.text(name)] = bool(bits >> bit & 1)
    return found


def set_panel_threshold(tokens: int) -> None:
    """For tests and tuning: tokens per matrix from which the prefill path is taken; 0 = the measured default."""
    whole_number(tokens, 0, 2**31 - 1, "set_panel_threshold")
    loaded().lib.kt_set_panel_threshold(tokens)


def set_exact(on: bool) -> None:
    """Whether to compute every product in fp32 from dequantized weights and fp32 activations: to verify, slowly."""
    loaded().lib.kt_set_exact(bool(on))


def bench_read(data: torch.Tensor) -> int:
    """Stream a uint8 tensor once through the pool's threads (a bandwidth probe); the value is meaningless."""
    state, pool = pooled()
    check_bytes(data, "bench_read")
    return state.lib.kt_bench_read(pool, state.ffi.cast("void *", data.data_ptr()), data.numel())


def bench_peak(kind: str, iterations: int) -> float:
    """Run register-only multiply-adds ("int8", "bf16" or "f32") on every thread; returns operations done (2 per
    multiply-add), 0.0 where the instruction set in use has none of that kind."""
    state, pool = pooled()
    kinds = ["int8", "bf16", "f32"]
    if kind not in kinds:
        raise NativeError(f"bench_peak: found {kind!r}, expected one of {', '.join(kinds)}.")
    whole_number(iterations, 0, 2**62, "bench_peak (iterations)")
    return state.lib.kt_bench_peak(pool, kinds.index(kind), iterations)


class Pool:
    """Threads other than the module's own, to give a queue its share of the machine. They start with the first call."""

    def __init__(self, threads: int | None = None, pin: bool | None = None, numa: str | None = None) -> None:
        """`threads`, the calling one included; `pin` and `numa` as KT_PIN and KT_NUMA say. None: as the variables say,
        or the machine. Raises NativeError for what is no such number or list."""
        if threads is not None:
            whole_number(threads, 1, MAX_THREADS, "Pool (threads)", ", or None")
        if numa is not None and not isinstance(numa, str):
            raise NativeError(f"Pool (numa): found {numa!r}, expected CPUs a node such as '0-3,8;4-7', or None.")
        self._state = loaded()
        self._pool = self._state.new_pool(
            threads or env.threads() or 0,
            env.pin() if pin is None else bool(pin),
            env.numa() if numa is None else numa,
        )

    @property
    def threads(self) -> int:
        """Threads, the calling one included."""
        return self._state.lib.kt_pool_threads(self._pool)

    @property
    def nodes(self) -> list[int]:
        """Threads of each NUMA node."""
        lib = self._state.lib
        return [lib.kt_pool_node_threads(self._pool, n) for n in range(lib.kt_pool_nodes(self._pool))]

    def resize(self, threads: int | None) -> None:
        """Use `threads` from now on; waits for the call under way. None: KT_THREADS or the machine's cores."""
        if threads is not None:
            whole_number(threads, 1, MAX_THREADS, "Pool.resize", ", or None")
        status = self._state.lib.kt_pool_resize(self._pool, threads or env.threads() or 0)
        self._state.check(status, f"Pool.resize({threads})")
