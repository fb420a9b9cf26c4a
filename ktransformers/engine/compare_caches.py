"""What another type of cache does to a model's predictions: the same tokens through one model, once for each type.

Tokens are given, not chosen, and come in chunks, so that every chunk but the first reads keys and values that were kept
before. All types go through a chunk before the next, so that only one chunk's logits are held.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig

from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.native.pages import PAGE
from ktransformers.operators.gpu_pages import GpuLayer, gpu_pages
from ktransformers.operators.paged_cache import FP8, PagedLayer, paged_cache


@dataclass
class CacheEffect:
    """What a type of cache costs and changes.

    `bytes_per_token`: of one sequence, in all layers that keep pages. `kl_mean`, `kl_max`: the Kullback-Leibler
    divergence of the next token's distribution from that with a cache in the model's dtype, in nats. `same_top`: the
    share of positions whose likeliest token is the same. `perplexity`: of the tokens given.
    """

    type: str
    bytes_per_token: int = 0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    same_top: float = 0.0
    perplexity: float = 0.0


def own_text(model: nn.Module, first: int, count: int, seed: int = 0) -> list[int]:
    """`count` token ids of `model`'s own: `first`, then what it says after that, drawn at temperature 1."""
    drawn = Sampling(GenerationConfig(do_sample=True, top_k=0), [])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [first, *generate(model, [first], max_new_tokens=count - 1, sampling=drawn)]


@torch.inference_mode()
def compare(
    model: nn.Module,
    ids: Sequence[int],
    types: Sequence[str],
    chunk_size: int = 64,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[CacheEffect]:
    """The effect of each of `types` ("f32", "f16", "bf16", "q8_0"; on a GPU "fp8"), after that of the model's dtype.

    Args:
        model: a causal LM that `optimize_and_load` made, on the CPU, or one of latents whose layers are on GPUs.
        ids: at least two token ids, of one sequence.
        chunk_size: tokens per forward pass.
        on_tokens: called with how many tokens a type has got through, one chunk at a time.

    Raises:
        KTransformersError: fewer than two tokens, or a type that there is not.
        UnsupportedError: no layer of the model computes on pages.
    """
    if len(ids) < 2 or chunk_size < 1:
        raise KTransformersError(
            f"tokens: found {len(ids)} in chunks of {chunk_size}, expected at least 2 in chunks of at least 1."
        )
    runs = [_Run(model, kind) for kind in dict.fromkeys([own_kind(model), *types])]
    for begin in range(0, len(ids), chunk_size):
        part, following = ids[begin : begin + chunk_size], ids[begin + 1 : begin + chunk_size + 1]
        true = None
        for run in runs:
            found = run.log_probabilities(part)
            true = found if true is None else true
            run.count(true, found, following)
            on_tokens(len(part))
    return [run.effect(len(ids)) for run in runs]


def _cache(model: nn.Module, kind: str) -> Cache:
    """A fresh one. Raises UnsupportedError where no layer keeps anything as `kind`."""
    on_gpu, own = gpu_pages(model, kind=kind), kind == own_kind(model)
    if on_gpu is not None and (own or any(getattr(layer, "fp8", False) for layer in on_gpu.layers)):
        return on_gpu
    found = None if kind == FP8 or on_gpu is not None else paged_cache(model, kind)
    if found is not None:
        return found
    what = "keeps latents on a GPU" if kind == FP8 else "computes on pages of the CPU"
    step = "a model of latents that is on GPUs" if kind == FP8 else "one whose attention the C library computes"
    raise UnsupportedError(
        f"cache: no layer of {type(model).__name__} {what}, so its cache is not made as {kind}. Give {step}."
    )


def own_kind(model: nn.Module) -> str:
    """The name of the model's dtype among types of caches."""
    return str(model.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")


class _Run:
    """One type of cache, and sums over the positions so far."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.cache = model, _cache(model, kind)
        self.found = CacheEffect(kind)
        self.loss = 0.0

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """[T, vocab] of the token after each of `ids` [T], in fp32."""
        given = torch.tensor([list(ids)], device=self.model.device)
        out: Any = self.model(input_ids=given, past_key_values=self.cache, use_cache=True)
        return out.logits[0].float().log_softmax(-1)

    def count(self, true: Tensor, found: Tensor, following: Sequence[int]) -> None:
        """Add positions: `true`, with the model's own cache, and `found` [T, vocab]; `following` is the ids after."""
        divergence = (true.exp() * (true - found)).nan_to_num().sum(-1)  # a token that is impossible: 0 * inf
        self.found.kl_mean += divergence.sum().item()
        self.found.kl_max = max(self.found.kl_max, divergence.max().item())
        self.found.same_top += (true.argmax(-1) == found.argmax(-1)).sum().item()
        targets = torch.tensor(list(following), device=found.device)
        self.loss -= found[torch.arange(len(targets)), targets].sum().item()

    def effect(self, tokens: int) -> CacheEffect:
        done, pages = self.found, [layer.pages for layer in self.cache.layers if isinstance(layer, PagedLayer)]
        done.bytes_per_token = sum(held.page_bytes for held in pages if held is not None) // PAGE
        done.bytes_per_token += sum(layer.bytes_per_token for layer in self.cache.layers if isinstance(layer, GpuLayer))
        done.kl_mean, done.same_top = max(0.0, done.kl_mean / tokens), done.same_top / tokens
        done.perplexity = torch.tensor(self.loss / (tokens - 1)).exp().item()
        return done
