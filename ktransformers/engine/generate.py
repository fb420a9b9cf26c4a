"""Prefill and decode: token ids in, token ids out, and how long each part took. Prints nothing."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.sampling import Chooser, Sampling
from ktransformers.engine.step import Steps
from ktransformers.errors import KTransformersError


@dataclass
class Timing:
    """Tokens and seconds of one answer. The first new token belongs to prefill, which computes its logits."""

    reused_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, 0.0 when none were computed."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first, 0.0 when there was no second one."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    chunk_size: int = 8192,
    sampling: Sampling | None = None,
    cache: PrefixCache | None = None,
    timing: Timing | None = None,
    tokenizer: Any = None,
) -> Iterator[int]:
    """Yield the ids of new tokens one by one; the stop token, if one comes, is not yielded.

    Args:
        model: a transformers causal LM, injected or not.
        ids: the whole prompt; what `cache` already holds of it is not computed again.
        max_new_tokens: most tokens to yield.
        chunk_size: prompt tokens per forward pass in prefill; bounds the memory of activations.
        sampling: None is the model's generation_config.
        cache: kept between the turns of a conversation; None is a fresh one.
        timing: filled in as generation goes on.
        tokenizer: needed where the generation_config has stop strings.

    Raises:
        KTransformersError: an empty prompt, sizes that are not positive, or a generation_config of no sense.
    """
    if not ids:
        raise KTransformersError("prompt: found no tokens, expected at least one.")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
        if value < 1:
            raise KTransformersError(f"{name}: found {value}, expected at least 1.")
    sampling = sampling or Sampling(model.generation_config)
    cache = cache or PrefixCache()
    timing = timing if timing is not None else Timing()
    choose = Chooser(sampling, model, ids, max_new_tokens, tokenizer)
    steps = Steps(model, cache)

    start = time.perf_counter()
    timing.reused_tokens = cache.reuse(ids)
    token = choose(steps.prompt(ids, chunk_size))
    cache.record()
    timing.prefill_tokens = len(ids) - timing.reused_tokens
    timing.prefill_seconds = time.perf_counter() - start

    for count in range(1, max_new_tokens + 1):
        if token in sampling.stop_ids:
            return
        yield token
        if count == max_new_tokens or choose.ended():
            return
        start = time.perf_counter()
        token = choose(steps.next(token))
        timing.decode_tokens += 1
        timing.decode_seconds += time.perf_counter() - start
