"""Log-probabilities in OpenAI's two shapes: lists of objects for chats, parallel lists for completions."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ktransformers.engine.requests import Logprobs
from ktransformers.server.choice import Scored
from ktransformers.server.vocabulary import Vocabulary

_LEAST = -9999.0
"""What stands for the logarithm of 0, which JSON cannot write; OpenAI's own."""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST


def of_chat(vocabulary: Vocabulary, scored: Sequence[Scored]) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""

    def one(token: int, value: float) -> dict[str, Any]:
        raw = vocabulary.bytes_of(token)
        return {"token": vocabulary.text_of(token), "logprob": _finite(value), "bytes": list(raw)}

    return {
        "content": [
            one(each.id, each.logprobs.chosen) | {"top_logprobs": [one(*pair) for pair in each.logprobs.top]}
            for each in scored
        ],
        "refusal": None,
    }


def of_completion(vocabulary: Vocabulary, scored: Iterable[tuple[int, Logprobs | None, int]]) -> dict[str, Any]:
    """The `logprobs` of a completion's choice, of (token, log-probabilities, where its text begins). A prompt's first
    token has none."""
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprobs, start in scored:
        lists["tokens"].append(vocabulary.text_of(token))
        lists["token_logprobs"].append(None if logprobs is None else _finite(logprobs.chosen))
        lists["top_logprobs"].append(None if logprobs is None else _top(vocabulary, token, logprobs))
        lists["text_offset"].append(start)
    return lists


def _top(vocabulary: Vocabulary, token: int, logprobs: Logprobs) -> dict[str, float]:
    """By text; of tokens with the same text the likelier counts. The chosen token is always among them."""
    found: dict[str, float] = {}
    for each, value in (*logprobs.top, (token, logprobs.chosen)):
        text = vocabulary.text_of(each)
        found[text] = max(found.get(text, -math.inf), _finite(value))
    return found
