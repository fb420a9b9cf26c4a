"""How fast a model reads prompts and writes tokens, from several depths of context on. Prints nothing."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ktransformers.configs import text_config
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.sampling import largest
from ktransformers.engine.step import Steps
from ktransformers.errors import KTransformersError


@dataclass
class Speed:
    """One kind of work: `tokens` of a prompt ("prefill") or one by one ("decode"), after `depth` tokens of context.

    `rates`: tokens per second, of each repetition.
    """

    work: str
    tokens: int
    depth: int
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median of tokens per second."""
        return statistics.median(self.rates)


def measure(
    model: nn.Module,
    prompts: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    repetitions: int = 3,
    chunk_size: int = 8192,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[Speed]:
    """Yield the speed of each size of prompt and of each number of new tokens, at each depth.

    Tokens are random, the same for every call. New tokens are chosen greedily and then not used: the next one is random
    too, so that a model which repeats itself does not meet the same experts. What fills the context is not timed, and
    neither is a first round.

    Args:
        model: a causal LM that `optimize_and_load` made.
        prompts, new_tokens, depths: tokens.
        chunk_size: tokens of a prompt per forward pass.
        on_tokens: called with the tokens that were computed since the last time.

    Raises:
        KTransformersError: sizes of no sense, or more tokens than the model takes.
    """
    _check(model, prompts, new_tokens, depths, repetitions, chunk_size)
    words = _Words(text_config(model.config).vocab_size)
    bench = _Bench(model, chunk_size, words, on_tokens)
    bench.prefill([], max(prompts, default=1))
    bench.decode([], 1)
    for depth in depths:
        context = words.some(depth)
        for count in prompts:
            yield Speed("prefill", count, depth, [bench.prefill(context, count) for _ in range(repetitions)])
        for count in new_tokens:
            yield Speed("decode", count, depth, [bench.decode(context, count) for _ in range(repetitions)])


def total_tokens(prompts: Sequence[int], new_tokens: Sequence[int], depths: Sequence[int], repetitions: int) -> int:
    """Tokens that `measure` tells of, its first round included, for a bar."""
    return max(prompts, default=1) + 1 + repetitions * len(depths) * (sum(prompts) + sum(new_tokens))


def _check(
    model: nn.Module,
    prompts: Sequence[int],
    new_tokens: Sequence[int],
    depths: Sequence[int],
    repetitions: int,
    chunk_size: int,
) -> None:
    for name, values, least in (
        ("prompt tokens", prompts, 1), ("new tokens", new_tokens, 1), ("depth", depths, 0),
        ("repetitions", [repetitions], 1), ("chunk size", [chunk_size], 1),
    ):  # fmt: skip
        if wrong := [value for value in values if value < least]:
            raise KTransformersError(f"{name}: found {wrong[0]}, expected at least {least}.")
    longest = max(depths, default=0) + max([*prompts, *new_tokens], default=0)
    most = getattr(text_config(model.config), "max_position_embeddings", None)
    if most and longest > most:
        raise KTransformersError(f"depth and tokens: found {longest} together, the model takes {most}. Give fewer.")


class _Words:
    """Random token ids."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._random = vocabulary, random.Random(0)

    def some(self, count: int) -> list[int]:
        return self._random.choices(range(self._vocabulary), k=count)


class _Bench:
    """One cache, filled and cut back between the repetitions."""

    def __init__(self, model: nn.Module, chunk_size: int, words: _Words, on_tokens: Callable[[int], None]) -> None:
        self.cache, self.words, self.chunk_size, self.on_tokens = PrefixCache(), words, chunk_size, on_tokens
        self.steps = Steps(model, self.cache)

    def prefill(self, context: list[int], count: int) -> float:
        prompt = context + self.words.some(count)
        self._fill(context)
        start = time.perf_counter()
        self.steps.prompt(prompt, self.chunk_size)
        return self._rate(count, start)

    def decode(self, context: list[int], count: int) -> float:
        following = self.words.some(count)
        self._fill(context or [following[0]])
        start = time.perf_counter()
        for token in following:
            largest(self.steps.next(token))
        return self._rate(count, start)

    def _rate(self, count: int, start: float) -> float:
        seconds = time.perf_counter() - start
        self.on_tokens(count)
        return count / seconds

    def _fill(self, context: list[int]) -> None:
        """The cache holds these tokens and no others; what cannot go back, as a recurrent state, is computed again."""
        self.cache.reuse([*context, -1])
        self.steps.prompt(context, self.chunk_size)
        self.cache.record()
