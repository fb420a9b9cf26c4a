"""An engine without a model: it says what it is told to, one token of each answer a step, in a thread of its own."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ktransformers.engine.requests import Closing, Done, Listener, Load, Logprobs, Prompt, QueueFull, Request, Token
from ktransformers.errors import KTransformersError


@dataclass
class FakeTicket:
    request: Request
    listener: Listener
    answers: list[list[int]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    begun: bool = False
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def over(self) -> bool:
        return len(self.ended) == self.request.n


def scored(token: int, count: int) -> Logprobs:
    """Log-probabilities that a test can foretell."""
    return Logprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(count)))


class FakeEngine:
    """Answers every request with the ids that `says(request, answer)` gives, then its stop token.

    Args:
        step_seconds: how long a step takes.
        max_waiting: requests that wait to run before QueueFull.
        fails_at: token number at which an answer ends with an error.
        cached: tokens of each prompt that were in a cache.
    """

    def __init__(
        self, says: Callable[[Request, int], Sequence[int]], *, context: int = 1024, vocab_size: int = 1536,
        step_seconds: float = 0.0, max_running: int = 8, max_waiting: int = 10_000, fails_at: int | None = None,
        cached: int = 0,
    ) -> None:  # fmt: skip
        self.context, self.says, self.vocab_size = context, says, vocab_size
        self.step_seconds, self.max_running, self.max_waiting = step_seconds, max_running, max_waiting
        self.fails_at, self.cached = fails_at, cached
        self.tickets: list[FakeTicket] = []
        self.steps = 0
        self._running: list[FakeTicket] = []
        self._waiting: list[FakeTicket] = []
        self._wake = threading.Condition()
        self._closing = self._closed = False
        self._new = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[Request]:
        return [ticket.request for ticket in self.tickets]

    def submit(self, request: Request, listener: Listener) -> FakeTicket:
        with self._wake:
            if self._closing:
                raise Closing("The engine takes no more requests.")
            if not request.ids or not all(0 <= token < self.vocab_size for token in request.ids):
                raise KTransformersError("ids: expected tokens of the vocabulary.")
            if len(request.ids) > self.context or request.max_new_tokens < 0 or request.n < 1:
                raise KTransformersError("sizes: out of range.")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull("Too many requests are waiting.")
            answers = [list(self.says(request, i)) for i in range(request.n)]
            ticket = FakeTicket(request, listener, answers, [0] * request.n)
            self.tickets.append(ticket)
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._running or self._waiting or self._closed):
                    self._wake.wait()
                if self._closed:
                    break
                while self._waiting and len(self._running) < self.max_running:
                    self._running.append(self._waiting.pop(0))
            for ticket in self._running:
                self._step(ticket)
            self._running = [ticket for ticket in self._running if not ticket.over]
            self.steps += 1
            if self.step_seconds:
                time.sleep(self.step_seconds)
        for ticket in [*self._running, *self._waiting]:
            self._end(ticket, "cancelled")
        self._running.clear(), self._waiting.clear()

    def _step(self, ticket: FakeTicket) -> None:
        request = ticket.request
        if ticket.cancelled:
            return self._end(ticket, "cancelled")
        if not ticket.begun:
            ticket.begun = True
            count = request.prompt_logprobs
            logprobs = () if count is None else tuple(scored(token, count) for token in request.ids[1:])
            ticket.listener(Prompt(min(self.cached, len(request.ids) - 1), logprobs))
        for i in range(request.n):
            if i not in ticket.ended:
                self._token(ticket, i)

    def _token(self, ticket: FakeTicket, i: int) -> None:
        request, at, said = ticket.request, ticket.sent[i], ticket.answers[i]
        if at >= request.max_new_tokens:
            done = Done(i, "length")
        elif self.fails_at is not None and at >= self.fails_at:
            done = Done(i, "error", error="the fake engine was told to fail")
        elif at >= len(said):
            done = Done(i, "stop", stop_id=min(request.sampling.stop_ids, default=None))
        else:
            ticket.sent[i] += 1
            self._new += 1
            logprobs = None if request.logprobs is None else scored(said[at], request.logprobs)
            return ticket.listener(Token(i, said[at], logprobs))
        ticket.ended.add(i)
        ticket.listener(done)

    def _end(self, ticket: FakeTicket, reason: str) -> None:
        for i in range(ticket.request.n):
            if i not in ticket.ended:
                ticket.ended.add(i)
                ticket.listener(Done(i, reason))

    def load(self) -> Load:
        return Load(
            len(self._running), len(self._waiting), 1000, 2000, new_tokens=self._new, steps=self.steps,
            cached_tokens=self.cached * len(self.tickets),
        )  # fmt: skip

    def drain(self, seconds: float) -> bool:
        self._closing = True
        deadline = time.monotonic() + seconds
        while (self._running or self._waiting) and time.monotonic() < deadline:
            time.sleep(0.005)
        return not (self._running or self._waiting)

    def close(self) -> None:
        self._closing = True
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(10)
