"""What is neither weights nor their products on this machine's CPU: attention over a cache, and a layer's rest.

Measured in a few seconds, attention with the shapes of the model that is planned for, the rest on a tiny model; for a
machine that is not at hand there is `assumed`. speed.py puts them together with bytes and operations.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ktransformers.planner.sizes import Cache

LAYER_SECONDS = 2e-5
"""Seconds of a layer with next to no weights for a token: meetings of threads, norms, router, rotation. Two cores of a
Sapphire Rapids at 2 GHz, 48 native layers in one call, half of it in that call."""

ELEMENTWISE = 60.0
"""Bytes moved by elementwise work for a hidden value of a token in a layer: norms, residuals, rotation, casts.
Fitted to prefill of the models of `make bench-plan`."""

DECODE_RATE, PREFILL_RATE, LATENT_RATE = 40e9, 90e9, 60e9
"""Operations per second of a core in attention over a cache: of eight heads that share keys, for one query and for
many; over latents. Measured as above with AVX-512, without AMX (`make bench-attention`)."""

MORE_LAYERS = 16
"""How many the longer of two tiny models has more: a layer takes some tens of microseconds, a step a thousand."""

MOST_QUERIES, MOST_KEYS = 512, 2048
"""Shapes that are timed; longer ones are taken in proportion."""


@dataclass
class Probes:
    """Seconds of what is no product with weights. `attention(cache, tokens, length)`: of one sequence in one layer."""

    attention: Callable[[Cache, int, int], float]
    layer_seconds: float = LAYER_SECONDS
    elementwise_bytes: float = ELEMENTWISE
    measured: bool = False


def assumed(cores: int) -> Probes:
    """For a machine that is not at hand."""

    def attention(cache: Cache, tokens: int, length: int) -> float:
        rate = LATENT_RATE if cache.is_latent else DECODE_RATE if tokens == 1 else PREFILL_RATE
        return cache.attention_ops(tokens, length) / (cores * rate)

    return Probes(attention)


def measure(latent: bool = False) -> Probes:
    """For this machine: attention is timed once for every shape asked for. `latent`: of a model with MLA.

    Raises NativeError when the C library is not built.
    """
    known: dict[tuple[int, ...], float] = {}

    def attention(cache: Cache, tokens: int, length: int) -> float:
        queries, keys = min(tokens, MOST_QUERIES), min(length, MOST_KEYS)
        shape = (cache.heads, cache.kv_heads, cache.head_dim, cache.expanded, queries, keys)
        if shape not in known:
            known[shape] = _attention_seconds(cache, queries, keys)
        return known[shape] * (tokens / queries) * (length / keys)

    return Probes(attention, _layer_seconds(latent), measured=True)


def _attention_seconds(cache: Cache, queries: int, keys: int) -> float:
    """One layer's attention as it is computed: natively over keys, and over latents absorbed to decode."""
    import torch

    from ktransformers import native

    heads, kv_heads, size = cache.heads, cache.kv_heads, cache.head_dim
    if cache.is_latent and queries > 1:
        kv_heads, size = heads, max(16, cache.expanded)
    with torch.inference_mode():
        q = torch.randn(1, heads, queries, size)
        k, v = (torch.randn(1, kv_heads, keys, size).bfloat16() for _ in range(2))
        latent = cache.is_latent and queries == 1  # one row is key and value; what absorbs them counts as a matrix
        return _median(lambda: native.attend(q, k, k if latent else v))


_SIZES = dict(
    vocab_size=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=32, head_dim=16,
    intermediate_size=64, num_experts_per_tok=2, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
_TINY = {
    False: ("qwen3_moe", "MoE", {"num_experts": 4}),
    True: (
        "deepseek_v2", "MLA",
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": None,
         "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    ),
}  # fmt: skip
"""Whether attention is latent -> the family, packaged rules and sizes of the tiny model that is timed for it."""


def _layer_seconds(latent: bool) -> float:
    """Seconds of a layer with next to no weights: what a decode step of many layers takes longer than one of two."""
    few, many = (_step_seconds(layers, *_TINY[latent]) for layers in (2, 2 + MORE_LAYERS))
    return max(many - few, 0.0) / MORE_LAYERS


def _step_seconds(layers: int, family: str, rule: str, sizes: dict) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ktransformers.optimize import optimize_and_load

    config = AutoConfig.for_model(family, **{**_SIZES, **sizes, "num_hidden_layers": layers})
    with tempfile.TemporaryDirectory(prefix="kt-") as folder:
        with torch.random.fork_rng(devices=[]), _no_bars():
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        everywhere = {f"cuda:{i}": "cpu" for i in range(torch.cuda.device_count())}
        optimize_and_load(model, rule, folder, devices={"cuda": "cpu", **everywhere}, progress=False)
        with torch.inference_mode():
            cache = model(torch.arange(16)[None], use_cache=True).past_key_values
            step = torch.tensor([[1]])
            return _median(lambda: model(step, past_key_values=cache, use_cache=True), 40)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _median(run: Callable[[], object], times: int = 5) -> float:
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
