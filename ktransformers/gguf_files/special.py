"""Tokens that end an answer whether a file names them by number or not: their text says it."""

from collections.abc import Iterator
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<end_of_utterance>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
)  # fmt: skip
"""Texts that end a turn or a document wherever they are tokens of their own; llama.cpp ends an answer at the same."""


def ends_of_turn(metadata: dict[str, Any]) -> Iterator[int]:
    """Ids of the tokens of a file's vocabulary that end an answer by their text.

    Converters often name one end (`eos_token_id`) of several: that of documents, in a model whose turns end with
    another. In the Harmony format, which has `<|return|>`, `<|end|>` ends one message of an answer only.
    """
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not hasattr(tokens, "__len__") or not hasattr(types, "__len__") or len(tokens) != len(types):
        return
    wanted = set(ENDS)
    marked = {text: n for n, (text, kind) in enumerate(zip(tokens, types, strict=True))
              if kind in (_CONTROL, _USER_DEFINED) and text in wanted}  # fmt: skip
    if "<|return|>" in marked:
        marked.pop("<|end|>", None)
    yield from marked.values()
