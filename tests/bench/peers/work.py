"""The work that every peer of `make bench-peers` gets: shapes, weights, routing and the fp32 truth.

One layer of routed experts: gate and up [I, H], down [H, I], K of E experts a token. A few different experts are made
and repeated; each expert still has memory of its own in each peer. Not a peer, and it times nothing.

Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.native import blocks

ROLES = ("gate", "up", "down")
CHECKED = 64  # tokens whose outputs are compared with the truth
Tensors = dict[str, np.ndarray]
"""One matrix as its checkpoint stores it: {"raw"} for GGUF blocks, {"weight", "scale"} and kin for safetensors."""


# ---- shapes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inner: int
    experts: int
    per_token: int


def shapes(memory: int) -> dict[str, Shape]:
    """The three shapes. S3 takes the largest power of two of experts of which six bf16 copies fit in half of
    `memory` bytes (four peers, of which two hold a second copy while they load), at most its model's 256."""
    each = 3 * 7168 * 2048 * 2
    fit = max(8, min(256, memory // 2 // (6 * each)))
    return {
        "S1": Shape("S1", 2048, 768, 128, 8),  # Qwen3-30B-A3B
        "S2": Shape("S2", 2048, 1408, 64, 6),  # DeepSeek-V2-Lite
        "S3": Shape("S3", 7168, 2048, 1 << (fit.bit_length() - 1), 8),  # DeepSeek-V3
    }


def last_level_cache() -> int:
    """Bytes of the largest cache of core 0; 32 MiB where the system does not say."""
    found = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(found, default=32 << 20)


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- weights -----------------------------------------------------------------------------------------------

GGUF = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
"""Types that tests/native/blocks.py makes, in GGUF's layout."""
FP8_BLOCK, INT4_GROUP, GPTQ_GROUP, MX_GROUP = 128, 32, 128, 32


def _normal(rng: np.random.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32)) * cols**-0.5


def _groups(w: torch.Tensor, size: int, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, cols/size, size] and the scales [rows, cols/size, 1] that bring each group's largest value to `top`."""
    grouped = w.reshape(w.shape[0], -1, size)
    return grouped, grouped.abs().amax(-1, keepdim=True) / top


def _fp8_bytes(w: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    q = w.clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.view(torch.uint8).numpy(), q.float()


def _fp8(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    b = FP8_BLOCK
    w = _normal(rng, rows, cols).reshape(rows // b, b, cols // b, b)
    scale = w.abs().amax((1, 3), keepdim=True) / 448
    raw, value = _fp8_bytes(w / scale)
    tensors = {"weight": raw.reshape(rows, cols), "scale": scale.reshape(rows // b, cols // b).numpy()}
    return tensors, (value * scale).reshape(rows, cols)


def _fp8_per_channel(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    w = _normal(rng, rows, cols)
    scale = w.abs().amax(-1, keepdim=True) / 448
    raw, value = _fp8_bytes(w / scale)
    return {"weight": raw, "scale": scale.reshape(rows).numpy()}, value * scale


def _mxfp8(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    w, scale = _groups(_normal(rng, rows, cols), MX_GROUP, 448)
    exponent = torch.ceil(torch.log2(scale))
    raw, value = _fp8_bytes(w / 2**exponent)
    codes = (exponent + 127).to(torch.uint8).reshape(rows, -1).numpy()
    return {"weight": raw.reshape(rows, cols), "scale": codes}, (value * 2**exponent).reshape(rows, cols)


def _int4(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors: two codes a byte, the lower column in the lower nibble, code 8 is zero; bf16 scales."""
    w, scale = _groups(_normal(rng, rows, cols), INT4_GROUP, 7)
    scale = scale.bfloat16().float()
    q = (torch.round(w / scale) + 8).clamp(0, 15)
    codes = q.to(torch.uint8).reshape(rows, cols)
    bits = scale.bfloat16().reshape(rows, -1).view(torch.int16).numpy()
    return {"weight": (codes[:, 0::2] | codes[:, 1::2] << 4).numpy(), "scale": bits}, ((q - 8) * scale).reshape(
        rows, cols
    )


def _gptq(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    """GPTQ: int32 [cols/8, rows] of eight codes along cols, symmetric (code 8 is zero), fp16 scales [cols/G, rows]."""
    w, scale = _groups(_normal(rng, rows, cols), GPTQ_GROUP, 7)
    scale = scale.half().float()
    q = (torch.round(w / scale) + 8).clamp(0, 15)
    codes = q.reshape(rows, cols).to(torch.int64).T.reshape(cols // 8, 8, rows)
    packed = sum(codes[:, j] << (4 * j) for j in range(8))
    tensors = {
        "qweight": packed.numpy().astype(np.uint32).view(np.int32),
        "scales": scale.reshape(rows, -1).T.contiguous().half().numpy(),
    }
    return tensors, ((q - 8) * scale).reshape(rows, cols)


def _per_row(top: int) -> Callable[[np.random.Generator, int, int], tuple[Tensors, torch.Tensor]]:
    """Integers to ±`top` with one scale a row, a power of two: then bf16 holds the values exactly, and upstream,
    which quantizes bf16 weights while it loads, finds these very codes."""

    def make(rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
        w = _normal(rng, rows, cols)
        scale = 2 ** torch.ceil(torch.log2(w.abs().amax(-1, keepdim=True) / top))
        q = torch.round(w / scale).clamp(-top, top)
        q[:, 0] = top  # each row reaches the top, so that amax/top is this scale
        return {"weight": q.to(torch.int8).numpy(), "scale": scale.reshape(rows).numpy()}, q * scale

    return make


SCALED: dict[str, Callable[[np.random.Generator, int, int], tuple[Tensors, torch.Tensor]]] = {
    "FP8": _fp8, "FP8_PERCHANNEL": _fp8_per_channel, "MXFP8": _mxfp8, "RAWINT4": _int4, "GPTQ_INT4": _gptq,
    "AMXINT8": _per_row(127), "AMXINT4": _per_row(7),
}  # fmt: skip
"""Types of safetensors checkpoints, by the method names that upstream's users know."""
TYPES = (*GGUF, *SCALED)


def _gguf(name: str, rng: np.random.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    packed = blocks.random_weight(rng, name, rows, cols)
    return {"raw": packed.data.numpy().reshape(rows, -1).copy()}, blocks.values(packed).float()


def block(name: str) -> int:
    """Columns that cannot be split."""
    if name in SCALED:
        return {"FP8": FP8_BLOCK, "GPTQ_INT4": GPTQ_GROUP}.get(name, 32)
    return blocks.FORMATS[name][0]


def missing(name: str) -> str:
    """Why there is no random weight of this type, or ""."""
    if name not in TYPES:
        return f"unknown type; known: {', '.join(TYPES)}"
    return "" if name in SCALED or name in blocks.FORMATS else "tests/native/blocks.py makes no weights of this type"


@dataclass
class Work:
    """What a peer is told to hold. `tensors[role][d]`: matrix d of `distinct`; expert e is matrix e % distinct."""

    type: str
    hidden: int
    inner: int
    experts: int
    per_token: int
    layers: int
    threads: int
    tokens: int  # at most, in one call
    tensors: dict[str, list[Tensors]]
    values: dict[str, list[np.ndarray]] | None = None  # dequantized, bf16 as int16; sent to torch only

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the checkpoint; AMXINT4's codes are kept one a byte here, two in its files."""
        return sum(
            t.nbytes // (2 if self.type == "AMXINT4" and t.dtype == np.int8 else 1)
            for role in ROLES
            for t in self.tensors[role][0].values()
        )

    def size(self, role: str) -> tuple[int, int]:
        return (self.hidden, self.inner) if role == "down" else (self.inner, self.hidden)


def make(shape: Shape, name: str, threads: int, tokens: int, quick: bool) -> tuple[Work, dict[str, list[torch.Tensor]]]:
    """The work and its weights' values in fp32. I grows to a multiple of the type's block (S2: 1408 to 1536)."""
    inner = -(-shape.inner // block(name)) * block(name)
    count = min(shape.experts, 16) if quick else shape.experts
    rng = np.random.default_rng(7)
    distinct = 4 if shape.hidden * inner < 1 << 23 else 2
    work = Work(name, shape.hidden, inner, count, shape.per_token, 1, threads, tokens, {r: [] for r in ROLES})
    values: dict[str, list[torch.Tensor]] = {r: [] for r in ROLES}
    for role in ROLES:
        for _ in range(distinct):
            one, value = SCALED[name](rng, *work.size(role)) if name in SCALED else _gguf(name, rng, *work.size(role))
            work.tensors[role].append({key: np.ascontiguousarray(array) for key, array in one.items()})
            values[role].append(value)
    # Sixteen times the last-level cache in all, so that next to nothing of a call is found there.
    work.layers = max(1, -(-(4 if quick else 16) * last_level_cache() // (work.expert_bytes * count)))
    return work, values


# ---- routing -----------------------------------------------------------------------------------------------


@dataclass
class Case:
    """Calls of T tokens. hidden [T, H] float32 with values that bf16 holds; ids [T, K] int64 and weights [T, K]
    float32 a draw."""

    hidden: np.ndarray
    draws: list[tuple[np.ndarray, np.ndarray]]

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def unique(self) -> float:
        """Experts that a call touches, mean over the draws."""
        return float(np.mean([len(np.unique(ids)) for ids, _ in self.draws]))


def case(work: Work, tokens: int, routing: str) -> Case:
    """K distinct experts a token. "uniform"; "skewed": the i-th most popular expert is drawn in proportion to
    1 / (i + 3), as in bench_native."""
    g = torch.Generator().manual_seed(1000 + tokens)
    hidden = torch.randn(tokens, work.hidden, generator=g).bfloat16().float().numpy()
    popularity = torch.zeros(work.experts)
    if routing == "skewed":
        popularity = -torch.log(3.0 + torch.randperm(work.experts, generator=g))
    draws = []
    for _ in range(64 if tokens <= 4 else 16):
        # Largest K of log-probability plus Gumbel noise: K draws without replacement.
        noise = -torch.log(-torch.log(torch.rand(tokens, work.experts, generator=g).clamp(1e-9, 1 - 1e-7)))
        ids = (popularity + noise).topk(work.per_token, dim=-1).indices
        weights = torch.rand(tokens, work.per_token, generator=g) + 0.1
        draws.append((ids.numpy(), (weights / weights.sum(-1, keepdim=True)).numpy()))
    return Case(hidden, draws)


def reference(work: Work, values: dict[str, list[torch.Tensor]], one: Case) -> torch.Tensor:
    """[min(T, CHECKED), H] in fp32: the first tokens of the first draw, computed from dequantized weights."""
    x = torch.from_numpy(one.hidden[:CHECKED])
    ids, weights = (torch.from_numpy(a[:CHECKED]) for a in one.draws[0])
    distinct = len(values["gate"])
    out = torch.zeros(x.shape)
    for d in range(distinct):
        share = (weights * (ids % distinct == d)).sum(-1, keepdim=True)
        inner = torch.nn.functional.silu(x @ values["gate"][d].T) * (x @ values["up"][d].T)
        out += share * (inner @ values["down"][d].T)
    return out
