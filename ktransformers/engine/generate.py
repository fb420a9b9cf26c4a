"""Prefill, decode, sampling: token ids in, token ids out, and how long each part took. Prints nothing."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ktransformers.engine.cache import PrefixCache
from ktransformers.errors import KTransformersError
from ktransformers.models import ONE_BY_ONE


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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy unless `do_sample`. Meanings as in transformers' GenerationConfig."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: Collection[int] = field(default_factory=frozenset)

    @classmethod
    def from_config(cls, config: GenerationConfig, stop_ids: Collection[int] = ()) -> "Sampling":
        """Take the defaults a model ships with; `stop_ids` are added to its end-of-sequence ids."""
        eos = config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return cls(
            do_sample=bool(config.do_sample),
            temperature=config.temperature or 1.0,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty or 1.0,
            stop_ids=frozenset([*eos, *stop_ids]),
        )

    def processors(self) -> LogitsProcessorList:
        """The transformers processors for these settings, in the order `model.generate` applies them."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.do_sample:
            return chosen
        if self.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chosen.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0.0:
            chosen.append(MinPLogitsWarper(self.min_p))
        return chosen


def generate(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    chunk_size: int = 8192,
    sampling: Sampling | None = None,
    cache: PrefixCache | None = None,
    timing: Timing | None = None,
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

    Raises:
        KTransformersError: an empty prompt, or sizes that are not positive.
    """
    if not ids:
        raise KTransformersError("prompt: found no tokens, expected at least one.")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
        if value < 1:
            raise KTransformersError(f"{name}: found {value}, expected at least 1.")
    sampling = sampling or Sampling.from_config(model.generation_config)
    cache = cache or PrefixCache()
    timing = timing if timing is not None else Timing()
    processors = sampling.processors()

    start = time.perf_counter()
    timing.reused_tokens = cache.reuse(ids)
    logits = _prefill(model, ids, cache, chunk_size)
    history = list(ids)
    token = _choose(logits, history, processors, sampling)
    timing.prefill_tokens = len(ids) - timing.reused_tokens
    timing.prefill_seconds = time.perf_counter() - start

    for count in range(1, max_new_tokens + 1):
        if token in sampling.stop_ids:
            return
        yield token
        if count == max_new_tokens:
            return
        start = time.perf_counter()
        logits = _forward(model, [token], cache)
        history.append(token)
        token = _choose(logits, history, processors, sampling)
        timing.decode_tokens += 1
        timing.decode_seconds += time.perf_counter() - start


def _prefill(model: nn.Module, ids: Sequence[int], cache: PrefixCache, chunk_size: int) -> torch.Tensor:
    """Run the part of `ids` that the cache lacks, in chunks; returns the logits [vocab] after the last token."""
    logits = None
    later = 1 if getattr(model.config, "model_type", None) in ONE_BY_ONE else chunk_size
    while len(cache.ids) < len(ids):
        begin = len(cache.ids)
        logits = _forward(model, ids[begin : begin + (later if begin else chunk_size)], cache)
    return logits


@torch.inference_mode()
def _forward(model: nn.Module, ids: Sequence[int], cache: PrefixCache) -> torch.Tensor:
    """One forward pass over `ids` [T] that extends the cache; returns float32 logits [vocab] of the last position."""
    input_ids = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=input_ids, past_key_values=cache.cache, use_cache=True, logits_to_keep=1)
    cache.cache = output.past_key_values
    cache.ids.extend(ids)
    return output.logits[0, -1].float()


def _choose(logits: torch.Tensor, history: list[int], processors: LogitsProcessorList, sampling: Sampling) -> int:
    if processors:
        logits = processors(torch.tensor([history], device=logits.device), logits[None])[0]
    if sampling.do_sample:
        return int(torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1))
    return int(logits.argmax())
