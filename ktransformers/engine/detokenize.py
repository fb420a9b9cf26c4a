"""Token ids to text as they come, never half a character."""

from collections.abc import Collection, Sequence
from typing import Any

_CONTEXT = 8
"""Tokens of what came before that the first piece is decoded with."""

_HELD = 16
"""Tokens held back at most. A character has four bytes, so what more tokens do not complete is none."""


class Detokenizer:
    """Turns token ids into text as they come, holding back the bytes of an unfinished character.

    Each step decodes only the tokens since the last piece and the piece before it, which gives tokenizers that join
    words differently at the start of a text the context they need. `ids` are all that were added, `text` is all that
    was returned for them so far. Special tokens have no text but those in `keep`.

    `before`: the tokens that the text goes on from, where it is to be joined to theirs.
    """

    def __init__(self, tokenizer: Any, keep: Collection[int] = (), before: Sequence[int] = ()):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""
        self._hidden = special_ids(tokenizer) - set(keep) if keep else None
        self._window: list[int] = []  # tokens of the last piece, and those since
        self._done = 0  # how many of them are the last piece's
        context = list(before[-_CONTEXT:])
        if context and not self._decode(context).endswith("\ufffd"):
            self._window, self._done = context, len(context)

    def add(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self.ids.append(token)
        self._window.append(token)
        return self._take(hold=True)

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        piece = self._take(hold=False).rstrip("\ufffd")  # an answer that was cut short may end inside a character
        self.text = self.text.rstrip("\ufffd")
        return piece

    def _take(self, hold: bool) -> str:
        before, now = self._decode(self._window[: self._done]), self._decode(self._window)
        if hold and now.endswith("\ufffd") and len(self._window) - self._done < _HELD:
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        if self._hidden is None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)


def special_ids(tokenizer: Any) -> set[int]:
    """What `skip_special_tokens` skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {id for id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
