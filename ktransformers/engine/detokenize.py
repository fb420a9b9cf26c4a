"""Token ids to text as they come, never half a character."""

from collections.abc import Collection
from typing import Any


class Detokenizer:
    """Turns token ids into text as they come, holding back the bytes of an unfinished character.

    Each step decodes only the tokens since the last piece and the piece before it, which gives tokenizers that join
    words differently at the start of a text the context they need. `text` is all that was returned so far.
    Special tokens have no text but those in `keep`.
    """

    def __init__(self, tokenizer: Any, keep: Collection[int] = ()):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""
        self._context, self._done = 0, 0  # offsets into ids
        self._hidden = _special(tokenizer) - set(keep) if keep else None

    def add(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self.ids.append(token)
        return self._take(hold=True)

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        piece = self._take(hold=False).rstrip("\ufffd")  # an answer that was cut short may end inside a character
        self.text = self.text.rstrip("\ufffd")
        return piece

    def _take(self, hold: bool) -> str:
        before, now = self._decode(self.ids[self._context : self._done]), self._decode(self.ids[self._context :])
        if hold and now.endswith("\ufffd"):
            return ""
        self._context, self._done = self._done, len(self.ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, ids: list[int]) -> str:
        if self._hidden is None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)


def _special(tokenizer: Any) -> set[int]:
    """What `skip_special_tokens` skips."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {id for id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
