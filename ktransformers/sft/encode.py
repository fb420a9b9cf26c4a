"""Conversations to token ids and labels: the model's own chat template, and only answers are learnt."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ktransformers.errors import SFTError
from ktransformers.sft.data import Example, Message

IGNORED = -100
"""The label of a token that is read and not learnt."""


@dataclass
class Counts:
    """What became of examples: tokens in all, tokens learnt, examples cut to the limit, those with nothing to learn."""

    examples: int = 0
    tokens: int = 0
    learnt: int = 0
    longest: int = 0
    cut: int = 0
    dropped: int = 0


def encode_all(
    examples: Iterable[Example], tokenizer: Any, cutoff: int, on_prompt: bool = False, last_only: bool = False
) -> tuple[list[dict[str, list[int]]], Counts]:
    """Rows of input_ids and labels, at most `cutoff` tokens each; one whose answers are all cut off is dropped."""
    rows, counts = [], Counts()
    for example in examples:
        ids, labels = encode(example, tokenizer, on_prompt, last_only)
        counts.cut += len(ids) > cutoff
        ids, labels = ids[:cutoff], labels[:cutoff]
        if all(label == IGNORED for label in labels):
            counts.dropped += 1
            continue
        rows.append({"input_ids": ids, "labels": labels})
        counts.examples += 1
        counts.tokens += len(ids)
        counts.longest = max(counts.longest, len(ids))
        counts.learnt += sum(label != IGNORED for label in labels)
    return rows, counts


def encode(
    example: Example, tokenizer: Any, on_prompt: bool = False, last_only: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; labels of questions are IGNORED unless `on_prompt`.

    Each answer is what the template adds to the prompt that asks for it, its end mark included. A template that writes
    earlier answers in another way than the last (one that leaves out old reasoning, say) gives the last alone to learn.
    """
    messages, ids, labels = example.messages, [], []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole, done = render(messages, tokenizer, example.tools), ""
    for i in answers:
        if i != answers[-1] and last_only:
            continue
        prompt = render(messages[:i], tokenizer, example.tools, asks=True)
        after = render(messages[: i + 1], tokenizer, example.tools)
        if not (after.startswith(prompt) and prompt.startswith(done) and whole.startswith(after)):
            if i != answers[-1]:
                continue
            prompt = _shared(prompt, after)
        for text, learnt in ((prompt[len(done) :], on_prompt), (after[len(prompt) :], True)):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learnt else [IGNORED] * len(part)
        done = after
    return ids, labels


def _shared(a: str, b: str) -> str:
    """The beginning that two texts share: an answer may follow something else than what asks for it."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def render(messages: list[Message], tokenizer: Any, tools: Any, asks: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # templates raise whatever they like, jinja's own kinds among them
        roles = " ".join(message["role"] for message in messages)
        raise SFTError(f"the model's chat template does not take a conversation of {roles}: {error}") from error
