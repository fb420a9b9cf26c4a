"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence


class Stops:
    """Passes text on until a stop string is complete, and never any part of one.

    What may be the beginning of a stop string is held back until it is known not to be. The stop string that is
    complete first counts, and of several the longest, however the text is cut into pieces.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found: str | None = None
        self._texts, self._held = tuple(texts), ""

    def add(self, text: str) -> str:
        """What of the text so far can be passed on; nothing more once `found` is set."""
        if self.found is not None or not self._texts:
            return "" if self.found is not None else text
        held = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._texts if (at := held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return held[:at]
        kept = max(_overlap(held, stop) for stop in self._texts)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, but for `stop` itself."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
