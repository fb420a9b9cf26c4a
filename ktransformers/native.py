"""The border to the C library (native/include/kt_native.h): the only file that knows ffi and lib.

It checks tensors, passes pointers and turns status codes into exceptions; it computes nothing. Importing it
starts no thread and works without the library being built: the first use then says what to do. The GIL is
released inside every C call, and calls from several threads on the one pool wait for each other.

Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import math
import os
import threading
from typing import TYPE_CHECKING, Any

import torch

from ktransformers import env
from ktransformers.errors import NativeError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from ktransformers.quants import Packed
    from ktransformers.scaled import ScaledWeight

SUPPORTED_TYPES = frozenset(
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
     "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
     "NVFP4"]
)  # fmt: skip
"""Block formats with C kernels (with SCALED_TYPES the rows of native/src/traits.c; a test holds them together)."""

SCALED_TYPES = frozenset(["F8_E4M3", "F4_E2M1", "I8", "U8", "I4", "GPTQ4", "GPTQ8", "AWQ4"])
"""Types with C kernels whose scales lie beside the codes (ktransformers.scaled)."""

SCALES = {"F32": 0, "F16": 1, "BF16": 2, "E8M0": 3, "E4M3": 4}
"""Names of kt_scale; a test holds them to the header."""

ACTIVATIONS = {
    "silu": 0, "gelu": 1, "gelu_tanh": 2, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4, "swigluoai": 5,
}  # fmt: skip
"""Names of kt_activation, in transformers' spelling where it has one; a test holds them to the header."""

NOT_BUILT = "the C library is not built or does not load; run `make setup` in the checkout"
"""What to say where `available()` is false."""

MAX_THREADS = 1024
"""Of a pool, as in native/src/threads.c; a test holds the two together."""

_lock = threading.RLock()
_state: Any = None


def _module() -> Any:
    try:
        from ktransformers import _native
    except ImportError as error:
        raise NativeError(f"ktransformers._native, which an installed wheel contains: {error}; {NOT_BUILT}.") from error
    return _native


class _State:
    """The loaded module and the one pool. Made at first use."""

    def __init__(self) -> None:
        module = _module()
        self.ffi, self.lib = module.ffi, module.lib
        self.pool: Any = None
        ids = [i for i in (*range(64), *range(1000, 1016)) if self.lib.kt_type_name(i)]
        self.type_ids = {self.text(self.lib.kt_type_name(i)): i for i in ids}
        self.dtypes = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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


def _native() -> _State:
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _State()
    return _state


def _pool() -> tuple[_State, Any]:
    state = _native()
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


# ---- the library and the machine ---------------------------------------------------------------------------


def available() -> bool:
    """Whether the C library is built and loads. Whether KT_ISA and KT_THREADS make sense shows at first use."""
    try:
        _module()
    except NativeError:
        return False
    return True


def isas() -> list[str]:
    """Instruction sets that this machine can run, lowest first, from "portable" on."""
    return _native().isas()


def isa() -> str:
    """The instruction set in use."""
    state = _native()
    return state.text(state.lib.kt_isa_name(state.lib.kt_isa_active()))


def set_isa(name: str) -> None:
    """Use instruction set `name` from now on, one of `isas()`. Raises NativeError for any other."""
    _native().force(name, "instruction set")


def default_threads() -> int:
    """Threads that suit this process: its cores, one thread each, within what affinity and cgroup grant."""
    return _native().lib.kt_default_threads()


def threads() -> int:
    """Threads of the pool, the calling one included. Makes the pool, but starts no thread."""
    state, pool = _pool()
    return state.lib.kt_pool_threads(pool)


def set_threads(count: int | None) -> None:
    """Use `count` threads from now on, the calling one included; None: KT_THREADS or the machine's cores.

    Waits for the calls under way. Raises NativeError for what is not a whole number from 1 to MAX_THREADS.
    """
    if count is not None:
        _whole(count, 1, MAX_THREADS, "set_threads", ", or None")
    state, pool = _pool()
    state.check(state.lib.kt_pool_resize(pool, count or env.threads() or 0), f"set_threads({count})")


def scratch_bytes() -> int:
    """Bytes of scratch memory that the pool holds: what its largest call needed, whatever the number of layers."""
    state, pool = _pool()
    return state.lib.kt_pool_scratch_bytes(pool)


def cpu_features() -> dict[str, bool]:
    """Features of the processor that the operating system enables too, by name."""
    state = _native()
    bits, found = state.lib.kt_cpu_features(), {}
    for bit in range(32):
        name = state.lib.kt_cpu_feature_name(bit)
        if name:
            found[state.text(name)] = bool(bits >> bit & 1)
    return found


def set_panel_threshold(tokens: int) -> None:
    """For tests and tuning: tokens per matrix from which the prefill path is taken; 0 = the measured default."""
    _whole(tokens, 0, 2**31 - 1, "set_panel_threshold")
    _native().lib.kt_set_panel_threshold(tokens)


def set_exact(on: bool) -> None:
    """Whether to compute every product in fp32 from dequantized weights and fp32 activations: to verify, slowly."""
    _native().lib.kt_set_exact(bool(on))


def bench_read(data: torch.Tensor) -> int:
    """Stream a uint8 tensor once through the pool's threads (a bandwidth probe); the value is meaningless."""
    state, pool = _pool()
    _bytes(data, "bench_read")
    return state.lib.kt_bench_read(pool, state.ffi.cast("void *", data.data_ptr()), data.numel())


def bench_peak(kind: str, iterations: int) -> float:
    """Run register-only multiply-adds ("int8", "bf16" or "f32") on every thread; returns operations done (2 per
    multiply-add), 0.0 where the instruction set in use has none of that kind."""
    state, pool = _pool()
    kinds = ["int8", "bf16", "f32"]
    if kind not in kinds:
        raise NativeError(f"bench_peak: found {kind!r}, expected one of {', '.join(kinds)}.")
    _whole(iterations, 0, 2**62, "bench_peak (iterations)")
    return state.lib.kt_bench_peak(pool, kinds.index(kind), iterations)


# ---- checks ------------------------------------------------------------------------------------------------


def _whole(value: Any, low: int, high: int, subject: str, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise NativeError(f"{subject}: found {value!r}, expected a whole number from {low} to {high}{otherwise}.")


def _tensor(value: Any, subject: str, expected: str, movable: bool = False) -> torch.Tensor:
    """`value` as a tensor whose memory can be read: strided, with values, on the cpu (or elsewhere if `movable`)."""
    if not isinstance(value, torch.Tensor):
        raise NativeError(f"{subject}: found {type(value).__name__}, expected {expected}.")
    if value.is_nested or value.layout is not torch.strided:
        found = "nested" if value.is_nested else value.layout
        raise NativeError(f"{subject}: found a tensor that is {found}, expected {expected}, torch.strided.")
    if value.is_meta or not (movable or value.device.type == "cpu"):
        raise NativeError(f"{subject}: found a tensor on {value.device}, expected {expected} on the cpu.")
    return value


def _plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` with its values in order in memory, as C reads them."""
    return x.detach().to("cpu", dtype).resolve_neg().contiguous()


def _bytes(data: Any, subject: str) -> None:
    expected = "a contiguous uint8 tensor"
    _tensor(data, subject, expected)
    if data.dtype != torch.uint8 or not data.is_contiguous():
        raise NativeError(
            f"{subject}: found {data.dtype}, contiguous={data.is_contiguous()}, expected {expected} on the cpu."
        )


def _shape(weight: Packed, subject: str) -> tuple[int, ...]:
    """The shape of a Packed of any number of dimensions, after checking that it is one and its bytes are bytes."""
    name, shape = getattr(getattr(weight, "type", None), "name", None), getattr(weight, "shape", None)
    if not isinstance(name, str) or not isinstance(shape, tuple) or not hasattr(weight, "data"):
        raise NativeError(f"{subject}: found {type(weight).__name__}, expected a Packed (see ktransformers.quants).")
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise NativeError(f"{subject}: found shape {shape}, expected whole numbers from 1 on.")
    _bytes(weight.data, f"{subject}, bytes")
    return shape


def _weight(state: _State, weight: Packed, subject: str, keep: list[Any], into: Any, flat: bool = False) -> Any:
    """Fill the kt_weight `into` from a Packed matrix after checking it; `keep` holds what must stay alive.

    `flat`: any number of dimensions, seen as a matrix. Returns the shape.
    """
    if hasattr(weight, "scale_type"):
        return _scaled_weight(state, weight, subject, keep, into)
    shape = _shape(weight, subject)
    name, data = weight.type.name, weight.data
    if name not in state.type_ids:
        raise UnsupportedError(
            f"{subject}: weight type {name} has no C kernel{did_you_mean(name, state.type_ids)}. "
            f"Computed: {', '.join(sorted(state.type_ids))}. Use an operator that dequantizes (KLinearTorch)."
        )
    if len(shape) != 2 and not flat:
        raise NativeError(f"{subject}: found shape {shape}, expected a matrix [rows, cols].")
    type_id, rows, cols = state.type_ids[name], math.prod(shape[:-1]), shape[-1]
    block, size = state.lib.kt_type_block(type_id), state.lib.kt_type_block_bytes(type_id)
    if cols % block:
        raise NativeError(f"{subject}: found shape {shape}, expected cols to be a multiple of {block} ({name}).")
    needed = rows * (cols // block) * size
    if data.numel() != needed:
        raise NativeError(f"{subject}: found {data.numel()} bytes, expected {needed} for {name} {list(shape)}.")
    into.type, into.rows, into.cols = type_id, rows, cols
    into.data, into.bytes = state.ffi.cast("void *", data.data_ptr()), data.numel()
    keep.append(data)
    return shape


def _scaled_weight(state: _State, weight: ScaledWeight, subject: str, keep: list[Any], into: Any) -> Any:
    """The same for a weight whose scales lie beside its codes. C checks the sizes; here only that memory is memory."""
    name, cast = weight.type.name, state.ffi.cast
    if name not in state.type_ids or weight.scale_type not in SCALES or len(weight.shape) != 2:
        raise UnsupportedError(
            f"{subject}: found {name} {list(weight.shape)} with scales of {weight.scale_type}, expected a matrix of "
            f"{', '.join(sorted(SCALED_TYPES))} with scales of {', '.join(SCALES)}."
        )
    for part in (weight.data, weight.scales, weight.zeros):
        if part is not None and (part.device.type != "cpu" or part.dtype != torch.uint8 or part.stride(-1) != 1):
            raise NativeError(f"{subject}: found {part.dtype} on {part.device}, expected rows of uint8 on the cpu.")
    into.type, (into.rows, into.cols) = state.type_ids[name], weight.shape
    into.data, into.bytes, into.stride = cast("void *", weight.data.data_ptr()), weight.span, weight.stride
    into.scales, into.scale_bytes = cast("void *", weight.scales.data_ptr()), weight.scale_span
    into.scale_stride, into.scale_type = weight.scale_stride, SCALES[weight.scale_type]
    into.scale_rows, into.scale_cols, into.scale = weight.scale_rows, weight.scale_cols, weight.global_scale
    if weight.zeros is not None:
        into.zeros, into.zero_bytes = cast("void *", weight.zeros.data_ptr()), weight.zero_span
        into.zero_stride, into.zero_bias = weight.zero_stride, weight.zero_bias
    if weight.order is not None:
        if weight.order.dtype != torch.int32 or tuple(weight.order.shape) != weight.shape[1:]:
            found = f"{weight.order.dtype} {list(weight.order.shape)}"
            raise NativeError(f"{subject}: found column order {found}, expected int32 [{weight.shape[1]}].")
        into.order = cast("int32_t *", weight.order.contiguous().data_ptr())
    keep.append(weight)
    return tuple(weight.shape)


def _input(state: _State, x: torch.Tensor, cols: int, subject: str) -> torch.Tensor:
    _tensor(x, subject, f"input [..., {cols}]")
    if x.dtype not in state.dtypes:
        raise NativeError(f"{subject}: found input of {x.dtype}, expected float32, bfloat16 or float16.")
    if x.ndim < 1 or x.shape[-1] != cols:
        raise NativeError(f"{subject}: found input of shape {list(x.shape)}, expected last dimension {cols}.")
    return _plain(x, x.dtype)


# ---- what operators use ------------------------------------------------------------------------------------


class Linear:
    """y = x @ W^T + bias on packed bytes. Keeps the Packed weight alive; makes no copy of it. No gradients."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None, name: str = "linear") -> None:
        """`weight` [N, K] packed along K, `bias` [N] of any float dtype. Raises UnsupportedError, NativeError."""
        state = _native()
        self.name, self.weight = name, weight
        self._keep: list[Any] = []
        self._w = state.ffi.new("kt_weight *")
        self.out_features, self.in_features = _weight(state, weight, f"{name} (weight)", self._keep, self._w)
        self.bias = None
        if bias is not None:
            expected = f"float [{self.out_features}]"
            _tensor(bias, f"{name} (bias)", expected, movable=True)
            if tuple(bias.shape) != (self.out_features,) or not bias.is_floating_point():
                raise NativeError(f"{name} (bias): found {bias.dtype} {list(bias.shape)}, expected {expected}.")
            self.bias = _plain(bias, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., K] of float32, bfloat16 or float16 -> [..., N] of the same dtype."""
        state, pool = _pool()
        x = _input(state, x, self.in_features, self.name)
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        cast = state.ffi.cast
        bias = state.ffi.NULL if self.bias is None else cast("float *", self.bias.data_ptr())
        status = state.lib.kt_linear(
            pool, self._w, bias, cast("void *", x.data_ptr()), state.dtypes[x.dtype],
            x.numel() // self.in_features, cast("void *", out.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return out

    __call__ = forward


class Experts:
    """Routed experts on packed bytes. Keeps the Packed weights alive; makes no copy of them. No gradients."""

    def __init__(
        self,
        gate: list[Packed] | None,
        up: list[Packed],
        down: list[Packed],
        activation: str = "silu",
        name: str = "experts",
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        alpha: float = 1.0,
        limit: float | None = None,
    ) -> None:
        """E matrices each: gate and up [I, H], down [H, I]; types may differ. `activation`: a key of ACTIVATIONS.

        `gate` None: experts without a gate, activation(up). Biases: floats [E, I], [E, I], [E, H]. Before the
        activation gate is cut to at most `limit` and up to -limit..limit. "swigluoai" is
        gate * sigmoid(alpha * gate) * (up + 1).
        Raises UnsupportedError for a weight type or activation without C code, NativeError for what does not fit.
        """
        state = _native()
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"{name}: activation {activation!r} is not computed in C{did_you_mean(str(activation), ACTIVATIONS)}. "
                f"Known: {', '.join(ACTIVATIONS)}."
            )
        roles = {"gate": gate, "up": up, "down": down}
        for role, weights in roles.items():
            if not isinstance(weights, (list, tuple)) and not (role == "gate" and weights is None):
                raise NativeError(f"{name} ({role}): found {type(weights).__name__}, expected a list of E Packed.")
        counts = [len(w) for w in roles.values() if w is not None]
        if not up or len(set(counts)) != 1:
            found = ", ".join(f"{len(w)} {role}" for role, w in roles.items() if w is not None)
            raise NativeError(f"{name}: found {found} matrices, expected E of each.")
        self.name, self.count = name, len(up)
        self._keep: list[Any] = []
        role = "up" if gate is None else "gate"
        first = _weight(state, roles[role][0], f"{name}.0.{role}", [], state.ffi.new("kt_weight *"))
        self.intermediate, self.hidden = first
        arrays = []
        shapes = {"up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
        for role, weights in roles.items():
            if weights is None:
                arrays.append(state.ffi.NULL)
                continue
            array = state.ffi.new("kt_weight[]", self.count)
            for e, weight in enumerate(weights):
                subject, expected = f"{name}.{e}.{role}", shapes.get(role, shapes["up"])
                shape = _weight(state, weight, subject, self._keep, array[e])
                if shape != expected:
                    raise NativeError(f"{subject}: found shape {list(shape)}, expected {list(expected)}.")
            arrays.append(array)
        glu = state.ffi.new("kt_glu *", {"activation": ACTIVATIONS[activation], "alpha": alpha})
        glu.limit = math.inf if limit is None else limit
        glu.gate_bias = self._bias(state, gate_bias, "gate", self.intermediate)
        glu.up_bias = self._bias(state, up_bias, "up", self.intermediate)
        glu.down_bias = self._bias(state, down_bias, "down", self.hidden)
        out = state.ffi.new("kt_experts **")
        status = state.lib.kt_experts_create(self.count, *arrays, glu, out)
        state.check(status, name)
        self._experts = state.ffi.gc(out[0], state.lib.kt_experts_destroy)

    def _bias(self, state: _State, bias: torch.Tensor | None, role: str, width: int) -> Any:
        """A pointer to fp32 [E, width] that this object keeps alive."""
        if bias is None:
            return state.ffi.NULL
        expected = f"float [{self.count}, {width}]"
        _tensor(bias, f"{self.name} ({role} bias)", expected, movable=True)
        if tuple(bias.shape) != (self.count, width) or not bias.is_floating_point():
            found = f"{bias.dtype} {list(bias.shape)}"
            raise NativeError(f"{self.name} ({role} bias): found {found}, expected {expected}.")
        self._keep.append(_plain(bias, torch.float32))
        return state.ffi.cast("float *", self._keep[-1].data_ptr())

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H] float32, bfloat16 or float16; `ids` [T, K] of an integer dtype; `weights` [T, K] float.

        Returns [T, H] of hidden's dtype. An id outside 0..E-1 is skipped; duplicate ids in a row both count.
        """
        state, pool = _pool()
        hidden, ids, weights = self._arguments(state, hidden, ids, weights)
        out = torch.empty_like(hidden)
        cast = state.ffi.cast
        status = state.lib.kt_experts_forward(
            self._experts, pool, cast("void *", hidden.data_ptr()), state.dtypes[hidden.dtype], hidden.shape[0],
            cast("int64_t *", ids.data_ptr()), ids.shape[1], cast("float *", weights.data_ptr()),
            cast("void *", out.data_ptr()),
        )  # fmt: skip
        state.check(status, self.name)
        return out

    def place(self, pool: Pool | None = None) -> None:
        """Read all weights in, each row by the NUMA node that will compute it in `pool` (None: the module's own), so
        that pages of a file that are not in memory yet come to lie there. Takes as long as reading the file."""
        state, handle = _pool() if pool is None else (pool._state, pool._pool)
        state.check(state.lib.kt_experts_place(self._experts, handle), self.name)

    def _arguments(
        self, state: _State, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three of `forward`, checked and as C reads them."""
        hidden = _input(state, hidden, self.hidden, self.name)
        _tensor(ids, f"{self.name} (ids)", "int64 [T, K]", movable=True)
        _tensor(weights, f"{self.name} (weights)", "float [T, K]", movable=True)
        if hidden.ndim != 2 or ids.ndim != 2 or ids.shape[0] != hidden.shape[0] or weights.shape != ids.shape:
            raise NativeError(
                f"{self.name}: found hidden {list(hidden.shape)}, ids {list(ids.shape)}, weights "
                f"{list(weights.shape)}; expected [T, {self.hidden}], [T, K], [T, K]."
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise NativeError(f"{self.name}: found ids of {ids.dtype}, expected int64.")
        if not weights.is_floating_point():
            raise NativeError(f"{self.name}: found weights of {weights.dtype}, expected a float dtype.")
        return hidden, _plain(ids, torch.int64), _plain(weights, torch.float32)

    __call__ = forward


def dequantize(packed: Packed) -> torch.Tensor:
    """The values of a packed tensor of any number of dimensions in float32, computed by the C library; same shape."""
    state = _native()
    w = state.ffi.new("kt_weight *")
    out = torch.empty(_weight(state, packed, "dequantize", [], w, flat=True), dtype=torch.float32)
    state.check(state.lib.kt_dequantize(w, state.ffi.cast("float *", out.data_ptr())), "dequantize")
    return out


# ---- pools and queues of one's own -------------------------------------------------------------------------


class Pool:
    """Threads beside the module's own, to give a queue its share of the machine. They start with the first call."""

    def __init__(self, threads: int | None = None, pin: bool | None = None, numa: str | None = None) -> None:
        """`threads`, the calling one included; `pin` and `numa` as KT_PIN and KT_NUMA say. None: as the variables say,
        or the machine. Raises NativeError for what is no such number or list."""
        if threads is not None:
            _whole(threads, 1, MAX_THREADS, "Pool (threads)", ", or None")
        if numa is not None and not isinstance(numa, str):
            raise NativeError(f"Pool (numa): found {numa!r}, expected CPUs a node such as '0-3,8;4-7', or None.")
        self._state = _native()
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
            _whole(threads, 1, MAX_THREADS, "Pool.resize", ", or None")
        status = self._state.lib.kt_pool_resize(self._pool, threads or env.threads() or 0)
        self._state.check(status, f"Pool.resize({threads})")


class HostCall:
    """A call for cudaLaunchHostFunc: addresses of a `void (*)(void *)` and of its argument. Both stay valid as long as
    this object, which must outlive the graph that holds it."""

    def __init__(self, function: Any, argument: Any, keep: Any, state: _State) -> None:
        self._keep = function, argument, keep
        self.function = int(state.ffi.cast("uintptr_t", function))
        self.argument = int(state.ffi.cast("uintptr_t", argument))


class _Submitted:
    """What a call needs until it is done. The number is None until the library has taken it."""

    def __init__(self, name: str, keep: Any) -> None:
        self.name, self.keep, self.number = name, keep, None


class Queue:
    """Calls that a thread of the queue's own computes in order, while Python goes on or a GPU works.

    Thread-safe. `close`, or the end of the object, waits for the call being computed and drops those behind it.
    """

    def __init__(self, pool: Pool | None = None) -> None:
        """`pool`: whose threads compute; None: the module's own."""
        if pool is not None and not isinstance(pool, Pool):
            raise NativeError(f"Queue: found {type(pool).__name__}, expected a Pool, or None.")
        state, handle = _pool() if pool is None else (pool._state, pool._pool)
        out = state.ffi.new("kt_queue **")
        state.check(state.lib.kt_queue_create(handle, out), "Queue")
        submitted: dict[_Submitted, None] = {}  # in order; adding and removing are atomic

        def destroy(queue: Any) -> None:
            state.lib.kt_queue_destroy(queue)
            submitted.clear()  # not before: the library may have been reading them
            _ = handle  # the pool ends after the queue

        self._state, self._submitted = state, submitted
        self._queue = state.ffi.gc(out[0], destroy)

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
        _whole(allow_pending, 0, 2**62, "Queue.sync (allow_pending)")
        state, queue = self._state, self._open()
        failed = state.ffi.new("int64_t *")
        status = state.lib.kt_sync(queue, allow_pending, failed)
        done, name = state.lib.kt_queue_done(queue), f"queue, call {failed[0] or 'not submitted'}"
        for entry in list(self._submitted):
            if entry.number is not None and entry.number <= done:
                name = entry.name if entry.number == failed[0] else name
                self._submitted.pop(entry, None)
        state.check(status, name)

    def host_submit(
        self, experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> HostCall:
        """`submit` as a host function that may run many times. It reads these very tensors each time, so all must be
        contiguous on the cpu, ids int64 and weights float32."""
        name, call, keep = self._experts_call(experts, hidden, ids, weights, out)
        for role, mine, read in (("hidden", hidden, keep[1]), ("ids", ids, keep[2]), ("weights", weights, keep[3])):
            if mine.data_ptr() != read.data_ptr():
                raise NativeError(
                    f"{name} ({role}): found {mine.dtype} on {mine.device}, contiguous={mine.is_contiguous()}; "
                    f"expected {read.dtype}, contiguous, on the cpu: a host function reads it each time it runs."
                )
        return HostCall(self._state.ffi.addressof(self._state.lib, "kt_submit_host"), call, (self, keep), self._state)

    def host_sync(self, allow_pending: int = 0) -> HostCall:
        """`sync` as a host function. What failed is raised by the next `sync`."""
        _whole(allow_pending, 0, 2**62, "Queue.host_sync (allow_pending)")
        wait = self._state.ffi.new("kt_wait *", {"queue": self._open(), "allow_pending": allow_pending})
        return HostCall(self._state.ffi.addressof(self._state.lib, "kt_sync_host"), wait, self, self._state)

    def close(self) -> None:
        """End the queue now. Calling it twice is fine; any other use of a closed queue raises NativeError."""
        if self._queue is not None:
            queue, self._queue = self._queue, None
            self._state.ffi.release(queue)

    def _open(self) -> Any:
        if self._queue is None:
            raise NativeError("Queue: found it closed, expected an open one. Make a new Queue.")
        return self._queue

    def _submit(self, name: str, call: Any, keep: Any) -> None:
        entry, number = _Submitted(name, keep), self._state.ffi.new("int64_t *")
        self._submitted[entry] = None  # first, so that Ctrl-C at any moment leaves the tensors alive
        status = self._state.lib.kt_submit(call, number)
        if status:
            del self._submitted[entry]
        self._state.check(status, name)
        entry.number = number[0]

    def _experts_call(self, experts: Experts, hidden: Any, ids: Any, weights: Any, out: Any) -> tuple[str, Any, Any]:
        if not isinstance(experts, Experts):
            raise NativeError(f"Queue: found {type(experts).__name__}, expected Experts.")
        state, name, cast = self._state, experts.name, self._state.ffi.cast
        hidden, ids, weights = experts._arguments(state, hidden, ids, weights)
        _output(out, hidden, [hidden.shape[0], experts.hidden], name)
        call = state.ffi.new("kt_call *", {
            "queue": self._open(), "experts": experts._experts, "ids": cast("int64_t *", ids.data_ptr()),
            "per_token": ids.shape[1], "weights": cast("float *", weights.data_ptr()),
            "input": cast("void *", hidden.data_ptr()), "dtype": state.dtypes[hidden.dtype],
            "tokens": hidden.shape[0], "out": cast("void *", out.data_ptr()),
        })  # fmt: skip
        return name, call, (experts, hidden, ids, weights, out)

    def _linear_call(self, linear: Linear, x: Any, out: Any) -> tuple[str, Any, Any]:
        if not isinstance(linear, Linear):
            raise NativeError(f"Queue: found {type(linear).__name__}, expected Linear.")
        state, name, cast = self._state, linear.name, self._state.ffi.cast
        x = _input(state, x, linear.in_features, name)
        _output(out, x, [*x.shape[:-1], linear.out_features], name)
        bias = state.ffi.NULL if linear.bias is None else cast("float *", linear.bias.data_ptr())
        call = state.ffi.new("kt_call *", {
            "queue": self._open(), "weight": linear._w, "bias": bias, "input": cast("void *", x.data_ptr()),
            "dtype": state.dtypes[x.dtype], "tokens": x.numel() // linear.in_features,
            "out": cast("void *", out.data_ptr()),
        })  # fmt: skip
        return name, call, (linear, x, out)


def _output(out: Any, like: torch.Tensor, shape: list[int], name: str) -> None:
    expected = f"{like.dtype} {shape}, contiguous"
    _tensor(out, f"{name} (out)", expected)
    if out.dtype != like.dtype or list(out.shape) != shape or not out.is_contiguous() or out.is_neg():
        raise NativeError(
            f"{name} (out): found {out.dtype} {list(out.shape)}, contiguous={out.is_contiguous()}; expected {expected}."
        )
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    if begin < like.data_ptr() + like.nbytes and like.data_ptr() < end:
        raise NativeError(f"{name} (out): found memory shared with the input, expected a tensor of its own.")
