"""What both sides of bench_whole.py do: prefill, decode at a depth, and answer lines of JSON on standard input.

Imports nothing but the standard library: llama.cpp's side runs in another interpreter.
"""

import json
import random
import sys
import time
from pathlib import Path

CHUNK = 512
"""Tokens of a prompt at once."""


class Engine:
    """A model and a cache; a subclass says how a cache begins, how long it is, and what a step is."""

    vocabulary: int
    batched: tuple[int, int] = (0, 0)
    """Sequences that decode together, and about how many tokens they began with."""

    def begin(self) -> None:
        """Start with an empty cache."""
        raise NotImplementedError

    def length(self) -> int:
        """Tokens in the cache."""
        raise NotImplementedError

    def step(self, ids: list[int]) -> None:
        """Compute these tokens, and wait for the logits of the last."""
        raise NotImplementedError

    def begin_batch(self, prompts: list[list[int]]) -> None:
        """Start with sequences of these tokens."""
        raise NotImplementedError

    def batch_step(self, ids: list[int]) -> None:
        """Compute one more token of each sequence, and wait for the logits of all."""
        raise NotImplementedError

    def prefill(self, tokens: int, count: int) -> list[float]:
        """Seconds of `count` prompts of so many random tokens."""
        return [self._timed(self._prompt, tokens) for _ in range(count)]

    def decode(self, tokens: int, count: int) -> list[float]:
        """Seconds of `count` tokens one by one, at a context of `tokens`, give or take the slices before."""
        if not tokens <= self.length() < tokens + 512:
            self._prompt(tokens)
            self._random_step(1)
        return [self._timed(self._random_step, 1) for _ in range(count)]

    def batch(self, sequences: int, tokens: int, count: int) -> list[float]:
        """Seconds of `count` steps of so many sequences, whose lengths differ, from `tokens` on."""
        if self.batched != (sequences, tokens):
            self.begin_batch([self._tokens(tokens + 7 * i) for i in range(sequences)])
            self.batched = sequences, tokens
        return [self._timed(self.batch_step, self._tokens(sequences)) for _ in range(count)]

    def memory(self) -> float:
        """Resident MB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def _prompt(self, tokens: int) -> None:
        self.begin()
        self.batched = (0, 0)
        for at in range(0, tokens, CHUNK):
            self._random_step(min(CHUNK, tokens - at))

    def _random_step(self, tokens: int) -> None:
        self.step(self._tokens(tokens))

    def _tokens(self, count: int) -> list[int]:
        return [random.randrange(260, self.vocabulary) for _ in range(count)]

    @staticmethod
    def _timed(work, argument) -> float:
        start = time.perf_counter()
        work(argument)
        return time.perf_counter() - start


def serve(engine: Engine) -> None:
    random.seed(1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(engine, request.pop("op"))(**request)), flush=True)
