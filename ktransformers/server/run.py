"""One HTTP request while the engine works on it: submitted, its events digested, ended when nobody reads it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktransformers.engine.detokenize import Detokenizer
from ktransformers.engine.requests import Closing, Done, Prompt, QueueFull, Request, Ticket, Token
from ktransformers.errors import KTransformersError
from ktransformers.server.answers import Reader
from ktransformers.server.choice import Choice, Delta
from ktransformers.server.errors import ApiError
from ktransformers.server.inbox import Arrival, Inbox
from ktransformers.server.prompts import Prompted
from ktransformers.server.service import Service

PING_SECONDS = 15.0
"""Silence after which a stream gets a comment, so that nobody between takes it for dead."""


@dataclass(frozen=True)
class Started:
    """Prompt number `source` is computed."""

    source: int
    prompt: Prompt


Update = Started | Delta


class Aborted(Exception):
    """The answers are of no use any more: `why` is "gone" (the client went), "behind" (it does not read) or "late"."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass
class Times:
    """Moments by time.perf_counter, 0.0 until they come."""

    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    """Of all answers but each one's first."""


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks of the engine: a request for each prompt. `joined`: the answer's text goes on from the
    prompt's, as a completion's does."""

    prompts: Sequence[Prompted]
    requests: Sequence[Request]
    stops: Sequence[str] = ()
    reader: Callable[[str], Reader] | None = None
    joined: bool = False


@dataclass
class Usage:
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    reasoning_tokens: int
    times: Times = field(default_factory=Times)

    def openai(self) -> dict[str, Any]:
        """As OpenAI counts: cached tokens are among those of the prompt."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def kt(self) -> dict[str, Any]:
        """What OpenAI does not tell: how fast it went. Rates are null where there was nothing to measure."""
        times = self.times
        wait, decode = times.first - times.begun, times.last - times.first
        computed = self.prompt_tokens - self.cached_tokens
        return {
            "cached_tokens": self.cached_tokens,
            "seconds_to_first_token": round(wait, 4) if times.first else None,
            "prompt_tokens_per_second": round(computed / wait, 2) if times.first and wait > 0 else None,
            "tokens_per_second": round(times.tokens / decode, 2) if times.tokens and decode > 0 else None,
        }


class Run:
    """Between `start`, which submits, and `close`, which cancels what has not ended. Answer j to prompt i has the index
    i * n + j."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service, self._asked = service, asked
        self._engine, self._tokenizer = service.ready().engine, service.ready().tokenizer
        self._tickets: list[Ticket] = []
        self._inbox = Inbox(service.bell(), service.settings.limits.unread_events, lambda: self.abort("behind"))
        self._timer: asyncio.TimerHandle | None = None
        self._aborted = ""
        self._last: dict[int, float] = {}  # choice -> when its last token came
        self._cached: dict[int, int] = {}  # prompt -> cached tokens
        self.times = Times()
        self.n = asked.requests[0].n
        self.on_abort: Callable[[], None] = self._inbox.wake
        self.choices = [self._choice(i, j) for i in range(len(asked.requests)) for j in range(self.n)]

    def _choice(self, source: int, answer: int) -> Choice:
        asked = self._asked
        prompt = asked.prompts[source]
        reader = asked.reader(prompt.text) if asked.reader else None
        words = Detokenizer(self._tokenizer, reader.keep if reader else (), prompt.ids if asked.joined else ())
        return Choice(source * self.n + answer, words, asked.stops, reader)

    def start(self) -> None:
        """Raises ApiError for what the engine does not take."""
        self.times.begun = time.perf_counter()
        try:
            for source, request in enumerate(self._asked.requests):
                self._tickets.append(self._engine.submit(request, self._inbox.listener(source)))
        except BaseException as error:
            self._cancel()
            raise _told(error) from error
        if seconds := self._service.settings.limits.request_seconds:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.abort, "late")

    def close(self) -> None:
        """Nobody waits for more."""
        if not self._ended():
            self._cancel()
            self._service.metrics.cancelled.labels(self._aborted or "error").inc()
        self._inbox.closed = True
        if self._timer:
            self._timer.cancel()

    def _cancel(self) -> None:
        self._inbox.closed = True
        for ticket in self._tickets:
            ticket.cancel()

    def abort(self, why: str) -> None:
        """Have `updates` raise Aborted; the engine is told at once. In the loop."""
        if not self._aborted:
            self._aborted = why
            self._cancel()
            self._inbox.wake()
            self.on_abort()

    @property
    def aborted(self) -> str:
        return self._aborted

    def _ended(self) -> bool:
        return all(choice.finish for choice in self.choices)

    async def updates(self) -> AsyncIterator[list[Update]]:
        """All that is new, each time there is something; an empty list where there was nothing for a while.

        Raises Aborted, and ApiError where the engine failed.
        """
        while not self._ended():
            arrivals = await self._inbox.take(PING_SECONDS)
            if self._aborted:
                raise Aborted(self._aborted)
            yield self._digest(arrivals)

    def _digest(self, arrivals: Sequence[Arrival]) -> list[Update]:
        updates: list[Update] = []
        touched: dict[int, Choice] = {}
        for moment, source, event in arrivals:
            if isinstance(event, Prompt):
                self._cached[source] = event.cached_tokens
                updates.append(Started(source, event))
                continue
            choice = self.choices[source * self.n + event.index]
            touched[choice.index] = choice
            if isinstance(event, Token):
                self._time(choice, moment)
                choice.add(event)
                self._release(source, choice)
            else:
                self._end(choice, event)
        return updates + [delta for choice in touched.values() if (delta := choice.take()) is not None]

    def _time(self, choice: Choice, moment: float) -> None:
        metrics, before = self._service.metrics, self._last.get(choice.index)
        self._last[choice.index] = self.times.last = moment
        if before is None:
            self.times.first = self.times.first or moment
            metrics.first.observe(moment - self.times.begun)
        else:
            self.times.tokens += choice.finish is None
            metrics.between.observe(moment - before)

    def _release(self, source: int, choice: Choice) -> None:
        """Tell the engine when all answers to a prompt have met a stop string."""
        first = source * self.n
        if choice.finish and all(each.finish for each in self.choices[first : first + self.n]):
            self._tickets[source].cancel()

    def _end(self, choice: Choice, done: Done) -> None:
        if choice.finish is None and done.reason == "error":
            raise ApiError(500, f"The engine could not go on with this answer: {done.error or 'no reason given'}")
        if choice.finish is None and done.reason == "cancelled":
            raise ApiError(503, "The server is shutting down.", headers={"Retry-After": "5"})
        choice.end(done)

    def usage(self) -> Usage:
        """So far."""
        prompt = sum(len(request.ids) for request in self._asked.requests)
        new = sum(choice.tokens for choice in self.choices)
        reasoning = sum(choice.reasoning for choice in self.choices)
        return Usage(prompt, sum(self._cached.values()), new, reasoning, self.times)


def _told(error: BaseException) -> BaseException:
    """What a client is told of an error at submit."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, Closing):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, KTransformersError):
        return ApiError(400, str(error))
    return error
