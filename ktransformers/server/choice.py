"""One answer on its way from tokens to what a client reads: text, stop strings, log-probabilities, pieces."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktransformers.engine.detokenize import Detokenizer
from ktransformers.engine.requests import Done, Logprobs, Token
from ktransformers.server.answers import Content, Piece, Reader, Reasoning
from ktransformers.server.stops import Stops


@dataclass(frozen=True)
class Scored:
    """A token with its log-probabilities. `start`: where its text begins in the answer, in characters."""

    id: int
    logprobs: Logprobs
    start: int


@dataclass
class Delta:
    """What answer `choice` has more than before. `finish`: why it ended, "stop" or "length"; None while it goes on."""

    choice: int
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish: str | None = None
    stop: str | None = None
    """The stop string that ended it."""


class Choice:
    """The state of answer `index`. Without a `reader` all its text is content. `tokens`: how many the model made, a
    stop token included; `reasoning`: how many of them were reasoning."""

    def __init__(self, index: int, words: Detokenizer, stops: Sequence[str], reader: Reader | None) -> None:
        self.index, self.tokens, self.reasoning, self.finish = index, 0, 0, None
        self._words, self._stops, self._reader = words, Stops(stops), reader
        self._scored: deque[Scored] = deque()
        self._delta = Delta(index)
        self._thinking = False
        self._passed = 0  # characters that were passed on

    def add(self, token: Token) -> None:
        """A token came."""
        if self.finish is not None:
            return
        self.tokens += 1
        if token.logprobs is not None:
            self._scored.append(Scored(token.id, token.logprobs, len(self._words.text)))
        self._pass(self._stops.add(self._words.add(token.id)))
        self.reasoning += self._thinking
        if self._stops.found is not None or self._reader is not None and self._reader.over:
            self._end("stop")

    def end(self, done: Done) -> None:
        """The engine has ended it."""
        if self.finish is not None:
            return
        self.tokens += done.stop_id is not None
        self._pass(self._stops.add(self._words.rest()))
        if self._stops.found is None:
            self._pass(self._stops.rest())
            self._release(lambda scored: True)
        self._end("length" if done.reason == "length" else "stop")

    def take(self) -> Delta | None:
        """What has come since the last call, if anything has."""
        delta = self._delta
        if not (delta.pieces or delta.scored or delta.finish):
            return None
        self._delta = Delta(self.index)
        return delta

    def _pass(self, text: str) -> None:
        if text:
            self._passed += len(text)
            self._delta.text += text
            pieces = self._reader.add(text) if self._reader else [Content(text)]
            self._delta.pieces += pieces
            self._thinking = isinstance(pieces[-1], Reasoning) if pieces else self._thinking
        self._release(lambda scored: scored.start < self._passed)

    def _release(self, ready: Callable[[Scored], Any]) -> None:
        """Log-probabilities follow the text: those of a stop string would tell it."""
        while self._scored and ready(self._scored[0]):
            self._delta.scored.append(self._scored.popleft())

    def _end(self, finish: str) -> None:
        self.finish = self._delta.finish = finish
        self._delta.stop = self._stops.found
        if self._reader:
            self._delta.pieces += self._reader.end()
