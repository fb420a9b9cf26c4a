"""Events on their way from the engine's thread to the event loop: nobody waits for a slow reader."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from ktransformers.engine.requests import Event, Listener

Arrival = tuple[float, int, Event]
"""When it came, by time.perf_counter; which of the requests to the engine it belongs to; what came."""


class Bell:
    """Wakes a loop once for all that rang since it last answered: a step of the engine has an event for each stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._rang: deque[Callable[[], None]] = deque()
        self._under_way = False

    def ring(self, answer: Callable[[], None]) -> None:
        """Have the loop call `answer`. From any thread; raises RuntimeError where the loop has been closed."""
        self._rang.append(answer)
        if not self._under_way:  # whoever sees True appended before `_answer` begins
            self._under_way = True
            self.loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._under_way = False
        while self._rang:
            self._rang.popleft()()


class Inbox:
    """Holds at most `limit` events for one reader, the coroutine that answers a client.

    `on_overflow` is called in the loop, once, when that many lie unread; later events are dropped.
    """

    def __init__(self, bell: Bell, limit: int, on_overflow: Callable[[], None]) -> None:
        self._bell, self._limit, self._on_overflow = bell, limit, on_overflow
        self._events: deque[Arrival] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._full = False
        self.closed = False

    def listener(self, source: int) -> Listener:
        """What is given to the engine with request number `source`."""

        def listen(event: Event) -> None:
            if self.closed or self._full:
                return
            if len(self._events) < self._limit:
                self._events.append((time.perf_counter(), source, event))
                self._bell.ring(self.wake)
            else:
                self._full = True
                self._bell.ring(self._on_overflow)

        return listen

    async def take(self, patience: float) -> list[Arrival]:
        """All that has come, at least one event; nothing after `patience` seconds of silence, or a `wake`."""
        if not self._events:
            self._waiter = self._bell.loop.create_future()
            timer = self._bell.loop.call_later(patience, self.wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return [self._events.popleft() for _ in range(len(self._events))]

    def wake(self) -> None:
        """End a `take` that waits. In the loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
