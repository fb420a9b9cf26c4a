"""This project's C library as a peer of `make bench-peers`, and the probes of the machine's limits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ktransformers import native
from ktransformers.errors import UnsupportedError
from ktransformers.quants import scaled
from tests.bench.peers.child import Missing, Peer, serve
from tests.bench.peers.work import ROLES, Case, Tensors, Work
from tests.native.blocks import Packed, Type

PROBE_BYTES = 256 << 20
BF16_ACTIVATIONS = ("BF16", "FP8", "FP8_PERCHANNEL", "MXFP8")
"""Types whose GEMM multiplies bf16; all others take fp32 activations."""


SCALED = {  # our type, type of its scales, rows and columns (0: all) that share one, codes, scales
    "FP8": ("F8_E4M3", "F32", 128, 128), "FP8_PERCHANNEL": ("F8_E4M3", "F32", 1, 0),
    "MXFP8": ("F8_E4M3", "E8M0", 1, 32), "RAWINT4": ("I4", "BF16", 1, 32), "GPTQ_INT4": ("GPTQ4", "F16", 1, 128),
    "AMXINT8": ("I8", "F32", 1, 0), "AMXINT4": ("I4", "F32", 1, 0),
}  # fmt: skip


def offered(name: str) -> bool:
    """Whether our library computes this type."""
    return SCALED[name][0] in native.SCALED_TYPES if name in SCALED else name in native.SUPPORTED_TYPES


def lines(array: np.ndarray) -> torch.Tensor:
    """The bytes as uint8 [lines, bytes]; a vector is a column."""
    return torch.from_numpy(array.reshape(len(array), -1).view(np.uint8))


def nibbles(codes: np.ndarray) -> np.ndarray:
    """int8 -8..7 to offset binary, two a byte, the lower column in the lower nibble."""
    shifted = (codes + 8).astype(np.uint8)
    return shifted[:, 0::2] | shifted[:, 1::2] << 4


def weight(name: str, size: tuple[int, int], data: torch.Tensor, tensors: Tensors) -> Any:
    """What native.Experts takes: `data`, bytes of the codes, with their separate scales in `tensors`."""
    if name not in SCALED:
        return Packed(data, Type(name), size)
    kind, scale_type, rows, cols = SCALED[name]
    scales = lines(tensors["scales" if "scales" in tensors else "scale"]).clone()
    codes = data.view(*scaled.SCALED_TYPES[kind].lines(*size))
    return scaled.ScaledWeight(scaled.SCALED_TYPES[kind], size, codes, scales, scale_type, rows, cols or size[1])


def codes(name: str, tensors: Tensors) -> np.ndarray:
    """The bytes of the codes."""
    found = next(tensors[key] for key in ("raw", "weight", "qweight") if key in tensors)
    return (nibbles(found) if name == "AMXINT4" else found).reshape(-1).view(np.uint8)


class Ours(Peer):
    def __init__(self) -> None:
        self.room: torch.Tensor | None = None

    def load(self, work: Work) -> str:
        if not offered(work.type):
            raise Missing("no kernel for this type yet")
        native.set_threads(work.threads)
        self.dtype = torch.bfloat16 if work.type in BF16_ACTIVATIONS else torch.float32
        try:
            self.layers = [native.Experts(*(self.role(work, role) for role in ROLES)) for _ in range(work.layers)]
        except UnsupportedError as error:
            raise Missing(str(error)) from error
        return native.isa()

    def role(self, work: Work, role: str) -> list[Any]:
        """E matrices whose codes lie in one buffer, as in a mapped file: all gates, all ups, all downs."""
        some = [codes(work.type, t) for t in work.tensors[role]]
        data = torch.empty(work.experts * some[0].nbytes, dtype=torch.uint8)
        out = []
        for e, view in enumerate(data.split(some[0].nbytes)):
            d = e % len(some)
            view.copy_(torch.from_numpy(some[d]))
            out.append(weight(work.type, work.size(role), view, work.tensors[role][d]))
        return out

    def prepare(self, case: Case) -> str:
        self.hidden = torch.from_numpy(case.hidden).to(self.dtype)
        self.draws = [(torch.from_numpy(i), torch.from_numpy(w)) for i, w in case.draws]
        return ""

    def call(self, layer: int, draw: int) -> None:
        self.out = self.layers[layer](self.hidden, *self.draws[draw])

    def output(self) -> np.ndarray:
        return self.out.float().numpy()

    def probe(self, kinds: list[str], threads: int) -> tuple[float, str, float]:
        """GB/s of reading; the first of `kinds` that the instruction set has (else ""), its GOP/s. About 10 ms each."""
        if self.room is None:
            native.set_threads(threads)
            self.room = torch.ones(PROBE_BYTES, dtype=torch.uint8)
        start = time.perf_counter()
        native.bench_read(self.room)
        read = PROBE_BYTES / (time.perf_counter() - start) / 1e9
        for kind in kinds:
            done, start = 0.0, time.perf_counter()
            while time.perf_counter() - start < 0.01:
                done += native.bench_peak(kind, 1_000_000)
            if done:
                return read, kind, done / (time.perf_counter() - start) / 1e9
        return read, "", 0.0


if __name__ == "__main__":
    serve(Ours)
