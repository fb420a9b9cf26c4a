"""The text of single tokens, for log-probabilities: exact bytes where the tokenizer's kind is known."""

import functools
import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """How byte-level tokenizers write bytes, GPT-2's table: printable ones as themselves, others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """Bytes of each token of a tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(number) for number in getattr(tokenizer, "added_tokens_decoder", {})}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = json.dumps(json.loads(decoder.__getstate__())) if decoder is not None else ""
        self._kind = "bytes" if '"ByteLevel"' in kinds else "pieces" if '"ByteFallback"' in kinds else ""
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to a text."""
        if (known := self._known.get(token)) is None:
            known = self._known[token] = self._bytes_of(token)
        return known

    def text_of(self, token: int) -> str:
        """The same as text; bytes that are no character of their own as bytes:\\xNN, as OpenAI writes them."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # an id of the model's that the tokenizer does not have
        if token in self._added or not self._kind:
            return self._decoded(token).encode()
        if self._kind == "pieces":
            found = _BYTE.fullmatch(piece)
            return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()
        table = _bytes_of_characters()
        return bytes(table[each] for each in piece) if all(each in table for each in piece) else piece.encode()

    def _decoded(self, token: int) -> str:
        """By decoding the token after itself: at the start of a text some tokenizers drop a space."""
        once = self._tokenizer.decode([token], skip_special_tokens=False)
        twice = self._tokenizer.decode([token, token], skip_special_tokens=False)
        return twice[len(once) :]
