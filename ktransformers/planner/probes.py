"""What torch itself costs on this machine's CPU: attention over a cache, and a layer's small operations.

Measured in well under a second each, with shapes of the model that is planned for; for a machine that is not at hand
`assumed` stands in. speed.py puts them together with bytes and operations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ktransformers.planner.sizes import Cache

LAYER_SECONDS = 5e-4
"""Seconds of Python, norms, router and rotation for one token in one layer: measured on one Zen 4 core at 3.1 GHz."""

ELEMENTWISE = 60.0
"""Bytes moved by elementwise work for a hidden value of a token in a layer: norms, residuals, rotation, casts.
Fitted to prefill of the models of `make bench-plan`."""

DECODE_RATE, PREFILL_RATE, LATENT_RATE = 2.4e9, 40e9, 60e9
"""Operations per second of a core in torch's attention over a cache: grouped, for one query and for many; over latents,
which is matrix products. Measured as above."""


@dataclass
class Probes:
    """Seconds of what torch does. `attention(cache, tokens, length)` is for one sequence and one layer."""

    attention: Callable[[Cache, int, int], float]
    layer_seconds: float = LAYER_SECONDS
    elementwise_bytes: float = ELEMENTWISE
    measured: bool = field(default=False)


def assumed(cores: int) -> Probes:
    """For a machine that is not at hand."""

    def attention(cache: Cache, tokens: int, length: int) -> float:
        rate = LATENT_RATE if cache.is_latent else DECODE_RATE if tokens == 1 else PREFILL_RATE
        return cache.attention_ops(tokens, length) / (cores * rate)

    return Probes(attention)


def measure() -> Probes:
    """For this machine: attention is timed once for every shape asked for."""
    known: dict[tuple[int, ...], float] = {}

    def attention(cache: Cache, tokens: int, length: int) -> float:
        queries, keys = min(tokens, 512), min(length, 4096)
        shape = (cache.heads, cache.kv_heads, cache.head_dim, queries, keys, cache.is_latent)
        if shape not in known:
            known[shape] = _attention_seconds(*shape)
        return known[shape] * (tokens / queries) * (length / keys)

    return Probes(attention, _layer_seconds(), measured=True)


def _attention_seconds(heads: int, kv_heads: int, head_dim: int, queries: int, keys: int, latents: bool) -> float:
    import torch
    import torch.nn.functional as F

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1 and queries == keys, enable_gqa=kv_heads != heads)

    def latent() -> None:
        scores = torch.matmul(q[0, :, :, :], k[0, 0].T)
        torch.matmul(scores.float().softmax(-1).to(q.dtype), v[0, 0])

    with torch.inference_mode():
        q = torch.randn(1, heads, queries, head_dim).bfloat16()
        k, v = (torch.randn(1, kv_heads, keys, head_dim).bfloat16() for _ in range(2))
        return _median(latent if latents else run)


def _layer_seconds() -> float:
    """Seconds of the small operations of one layer: norms, rotation, a router, residuals, on one token."""
    import torch

    hidden, heads, size = 256, 8, 32
    with torch.inference_mode():
        x, weight = torch.randn(1, 1, hidden).bfloat16(), torch.ones(hidden).bfloat16()
        cos = torch.randn(1, 1, size).bfloat16()
        router = torch.randn(64, hidden).bfloat16()

        def norm(y: torch.Tensor) -> torch.Tensor:
            z = y.float()
            return weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)

        def layer() -> None:
            y = norm(x)
            for _ in range(2):
                part = y.view(1, heads, 1, size)
                half = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
                _ = part * cos + half * cos
            y = norm(x + y)
            scores = torch.softmax((y.view(1, -1) @ router.T).float(), -1)
            top, ids = torch.topk(scores, 8)
            _ = (top / top.sum(-1, keepdim=True)).to(y.dtype), x + y, ids

        return LAYER_OVER_PROBE * _median(layer, 40)


LAYER_OVER_PROBE = 2.5
"""A layer of a model over the probe above, for module calls, hooks, masks and caches. Fitted as ELEMENTWISE."""


def _median(run: Callable[[], None], times: int = 5) -> float:
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
