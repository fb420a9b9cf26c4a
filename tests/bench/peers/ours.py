"""This project's C library as a peer of `make bench-peers`, and the probes of the machine's limits."""

from __future__ import annotations

import time

import numpy as np
import torch

from ktransformers import native
from tests.bench.peers.child import Missing, Peer, serve
from tests.bench.peers.work import ROLES, Case, Tensors, Work
from tests.native.blocks import Packed, Type

PROBE_BYTES = 256 << 20
BF16_ACTIVATIONS = ("BF16", "FP8", "FP8_PERCHANNEL", "MXFP8")
"""Types whose GEMM multiplies bf16; all others take fp32 activations."""


def parts(name: str, tensors: Tensors) -> list[np.ndarray]:
    if name not in native.SUPPORTED_TYPES or "raw" not in tensors:
        raise Missing(f"{name} has no kernel in this library")
    return [tensors["raw"]]


class Ours(Peer):
    def __init__(self) -> None:
        self.room: torch.Tensor | None = None

    def load(self, work: Work) -> str:
        native.set_threads(work.threads)
        dtype = torch.bfloat16 if work.type in BF16_ACTIVATIONS else torch.float32
        raw = {r: [parts(work.type, t)[0] for t in work.tensors[r]] for r in ROLES}
        self.layers = []
        for _ in range(work.layers):
            # One buffer a role, as in a mapped GGUF: all gates, all ups, all downs.
            packed = []
            for role in ROLES:
                each = raw[role][0].nbytes
                data = torch.empty(work.experts * each, dtype=torch.uint8)
                for e in range(work.experts):
                    one = raw[role][e % len(raw[role])]
                    data[e * each : (e + 1) * each] = torch.from_numpy(one.reshape(-1).view(np.uint8))
                views = data.split(each)
                packed.append([Packed(view, Type(work.type), work.size(role)) for view in views])
            self.layers.append(native.Experts(*packed))
        self.dtype = dtype
        return native.isa()

    def prepare(self, case: Case) -> str:
        self.hidden = torch.from_numpy(case.hidden).to(self.dtype)
        self.draws = [(torch.from_numpy(i), torch.from_numpy(w)) for i, w in case.draws]
        return ""

    def call(self, layer: int, draw: int) -> None:
        self.out = self.layers[layer](self.hidden, *self.draws[draw])

    def output(self) -> np.ndarray:
        return self.out.float().numpy()

    def probe(self, kinds: list[str], threads: int) -> tuple[float, float]:
        """GB/s of reading and GOP/s of the first of `kinds` that the instruction set has (else 0). About 10 ms each."""
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
                return read, done / (time.perf_counter() - start) / 1e9
        return read, 0.0


if __name__ == "__main__":
    serve(Ours)
