"""torch's own experts as a peer of `make bench-peers`: bf16, as transformers runs them on a CPU.

Two ways, and the faster one at each token count is measured: `grouped_mm` over tokens sorted by expert
(transformers' default) and F.linear per expert (its "eager"; oneDNN). Weights of every other type are dequantized to bf16
first, since that is what a user of transformers computes with.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch.nn import functional

from tests.bench.peers.child import Missing, Peer, serve
from tests.bench.peers.work import Case, Work


class Torch(Peer):
    def load(self, work: Work) -> str:
        if work.values is None:
            raise Missing("no dequantized weights were sent")
        torch.set_num_threads(work.threads)
        torch.set_grad_enabled(False)
        self.work = work
        gate, up, down = (
            [torch.from_numpy(v).view(torch.bfloat16) for v in work.values[role]] for role in ("gate", "up", "down")
        )
        both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        pick = [e % len(both) for e in range(work.experts)]
        self.layers = [
            (torch.stack([both[d] for d in pick]), torch.stack([down[d] for d in pick])) for _ in range(work.layers)
        ]
        return torch.backends.cpu.get_cpu_capability()

    def grouped(self, layer: int, draw: int) -> torch.Tensor:
        gate_up, down = self.layers[layer]
        ids, weights = self.draws[draw]
        k = self.work.per_token
        order, at = torch.sort(ids.reshape(-1))
        ends = torch.bincount(order, minlength=self.work.experts).cumsum(0).to(torch.int32)
        both = functional.grouped_mm(self.hidden[at // k], gate_up.transpose(-2, -1), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        out = functional.grouped_mm(functional.silu(gate) * up, down.transpose(-2, -1), offs=ends)
        out = out * weights.reshape(-1)[at].unsqueeze(-1)
        back = torch.empty_like(at)
        back[at] = torch.arange(at.numel())
        return out[back].view(-1, k, self.work.hidden).sum(1)

    def each(self, layer: int, draw: int) -> torch.Tensor:
        gate_up, down = self.layers[layer]
        ids, weights = self.draws[draw]
        out = torch.zeros_like(self.hidden)
        for e in torch.unique(ids).tolist():
            token, slot = torch.where(ids == e)
            gate, up = functional.linear(self.hidden[token], gate_up[e]).chunk(2, dim=-1)
            one = functional.linear(functional.silu(gate) * up, down[e])
            out.index_add_(0, token, one * weights[token, slot].unsqueeze(-1))
        return out

    def prepare(self, case: Case) -> str:
        self.hidden = torch.from_numpy(case.hidden).bfloat16()
        self.draws = [(torch.from_numpy(i), torch.from_numpy(w).bfloat16()) for i, w in case.draws]
        spent = {}
        for name, way in (("grouped_mm", self.grouped), ("F.linear", self.each)):
            way(0, 0)
            times = []
            for draw in range(1, 4):
                start = time.perf_counter()
                way(0, draw)
                times.append(time.perf_counter() - start)
            spent[name] = (min(times), way)
        best = min(spent, key=lambda name: spent[name][0])
        self.way = spent[best][1]
        return best

    def call(self, layer: int, draw: int) -> None:
        self.out = self.way(layer, draw)

    def output(self) -> np.ndarray:
        return self.out.float().numpy()


if __name__ == "__main__":
    serve(Torch)
