"""Constraints by llguidance: its view of a tokenizer, its matchers, and masks of a model's scores.

A mask is applied by adding 0 or -inf, eight scores at a time from a table. torch's masked_fill_ takes two to nine times
as long, `llguidance.numpy` more, and `llguidance.torch` compiles, for seconds, at its first call.
"""

import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ktransformers.engine.requests import Constraint
from ktransformers.errors import KTransformersError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class ConstraintError(KTransformersError, ValueError):
    """What an answer shall be cannot be made a grammar, or an answer cannot go on within it."""


_vocabularies: WeakKeyDictionary = WeakKeyDictionary()
_lock = threading.Lock()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UnsupportedError(
            f"response_format, tool_choice, regex and grammar need the package llguidance ({error}): "
            "pip install ktransformers[serve]"
        ) from error
    return llguidance


def vocabulary(tokenizer: Any, vocab_size: int, stop: Sequence[int] = ()) -> Any:
    """A tokenizer as llguidance has it, made once: that takes seconds for a large vocabulary.

    It has `vocab_size` tokens or more: those that the model has scores for and the tokenizer no text may never come.
    """
    _llguidance()
    from llguidance.hf import from_tokenizer
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedError(
            f"{type(tokenizer).__name__}: an answer can be held to a grammar with a fast tokenizer, one of a "
            "tokenizer.json. Leave response_format, tool_choice, regex and grammar out."
        )
    ends = list(dict.fromkeys(id for id in (tokenizer.eos_token_id, *stop) if id is not None))
    size = max(vocab_size, len(tokenizer))
    key = len(tokenizer), size, tuple(ends)
    with _lock:
        made = _vocabularies.setdefault(tokenizer, {})
        if key not in made:
            made[key] = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends or None)
        return made[key]


def matcher(vocabulary: Any, grammar: str) -> Any:
    """A matcher at the beginning of an answer. It is in its error state where the grammar cannot be used."""
    return _llguidance().LLMatcher(vocabulary, grammar, log_level=0)


def lark_of(regex: str) -> str:
    """The grammar of a regular expression."""
    return f"start: /{_llguidance().regex_to_lark(regex)}/"


@cache
def _of_byte() -> Any:
    """What a byte of the mask adds to its eight scores: float32 [256, 8]."""
    import numpy as np

    allowed = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(allowed, 0, -np.inf).astype(np.float32)


class Grammar:
    """A Constraint: what a matcher allows. `size`: tokens of its vocabulary."""

    def __init__(self, matcher: Any, size: int):
        import numpy as np

        self._matcher = matcher
        self._bits = np.empty((1, -(-size // 32)), np.int32)

    def mask(self, scores: "Tensor") -> None:
        import numpy as np
        import torch
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        added = np.take(_of_byte(), self._bits[0].view(np.uint8), axis=0).reshape(-1)[: scores.numel()]
        scores.add_(torch.from_numpy(added).to(scores.device))

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error().split("<state")[0].strip()
            raise ConstraintError(f"the answer cannot go on within its grammar: {error[:300]}")


class AfterThought:
    """A Constraint that begins after the model's reasoning.

    Args:
        inner: the constraint of what comes then.
        think: the marks around reasoning.
        begun: whether the answer begins inside it; else it may begin with it.
    """

    def __init__(self, inner: Constraint, tokenizer: Any, think: tuple[str, str], begun: bool):
        self._inner, self._tokenizer, self._end = inner, tokenizer, think[1]
        ids = tokenizer.get_added_vocab()
        self._begin_id, self._end_id = (ids.get(mark) for mark in think)
        self._inside, self._before = begun, not begun
        self._last: list[int] = []

    def mask(self, scores: "Tensor") -> None:
        if self._inside:
            return
        begin = self._begin_id if self._before else None
        score = None if begin is None else float(scores[begin])
        self._inner.mask(scores)
        if score is not None:
            scores[begin] = score

    def accept(self, token: int) -> bool:
        if self._inside:
            self._inside = not self._ends(token)
            return False
        if self._before and token == self._begin_id:
            self._inside, self._before = True, False
            return False
        self._before = self._before and not self._tokenizer.decode([token]).strip()
        return self._inner.accept(token)

    def _ends(self, token: int) -> bool:
        if self._end_id is not None:
            return token == self._end_id
        self._last = [*self._last[-len(self._end) :], token]  # the mark may have as many tokens as letters
        return self._end in self._tokenizer.decode(self._last)
