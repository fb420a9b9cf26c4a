"""How a run is waited for: whole, or as server-sent events. Either way it ends as soon as the client is gone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from ktransformers.engine.requests import Prompt
from ktransformers.server.choice import Delta
from ktransformers.server.encoding import dumps
from ktransformers.server.errors import ApiError
from ktransformers.server.run import Aborted, Run, Started, Update, Usage

GONE = 499
"""Status, seen in the log alone, of a request whose client went."""

_LAST_WORDS = 5.0
"""Seconds for a client to take the error that ends its stream."""

_PING = b": waiting\n\n"

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Nothing between may collect events."""


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + dumps(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Frames(Protocol):
    """What an API sends while a run goes on, as bytes of events."""

    def update(self, update: Update) -> bytes: ...

    def closing(self, usage: Usage) -> bytes: ...

    def failure(self, error: ApiError) -> bytes: ...


class EventStream(Response):
    """Sends the frames of a run that was started."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, frames: Frames) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._run, self._frames = run, frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender, sending = asyncio.current_task(), False

        def stop_sending() -> None:
            if sending and sender is not None:
                sender.cancel()  # it waits for a client that does not read

        async def pass_on(body: bytes, more: bool = True) -> None:
            nonlocal sending
            sending = True
            await send({"type": "http.response.body", "body": body, "more_body": more})
            sending = False

        self._run.on_abort = stop_sending
        async with watched(self._run, receive, scope):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for updates in self._run.updates():
                    frames = b"".join(map(self._frames.update, updates)) if updates else _PING
                    if frames:
                        await pass_on(frames)
                await pass_on(self._frames.closing(self._run.usage()), more=False)
            except Aborted as aborted:
                if aborted.why == "late":  # the others hear nothing any more
                    with contextlib.suppress(asyncio.TimeoutError):
                        last = pass_on(self._frames.failure(_told(aborted)), more=False)
                        await asyncio.wait_for(last, _LAST_WORDS)
            except ApiError as error:
                await pass_on(self._frames.failure(error), more=False)
            except asyncio.CancelledError:
                if not self._run.aborted:
                    raise


@contextlib.asynccontextmanager
async def watched(run: Run, receive: Receive, scope: Scope) -> AsyncIterator[None]:
    """Abort the run as soon as the client goes; close it, and note it for the log, in the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        run.abort("gone")

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        run.close()
        usage = run.usage()
        scope["kt_log"] |= dict(prompt=usage.prompt_tokens, cached=usage.cached_tokens, new=usage.new_tokens)


class Whole:
    """All that a run gave. `choices`: one Delta each, from the first to the last token."""

    def __init__(self, run: Run) -> None:
        self.choices = [Delta(choice.index) for choice in run.choices]
        self.prompts: dict[int, Prompt] = {}

    def add(self, update: Update) -> None:
        """The next of the run's updates."""
        if isinstance(update, Started):
            self.prompts[update.source] = update.prompt
            return
        all_of_it = self.choices[update.choice]
        all_of_it.text += update.text
        all_of_it.pieces += update.pieces
        all_of_it.scored += update.scored
        all_of_it.finish, all_of_it.stop = update.finish, update.stop


async def gathered(run: Run, request: Request) -> Whole:
    """Wait for all of a run. Raises ApiError where the engine failed, time is up or the client went."""
    whole = Whole(run)
    async with watched(run, request.receive, request.scope):
        try:
            async for updates in run.updates():
                for update in updates:
                    whole.add(update)
        except Aborted as aborted:
            raise _told(aborted) from aborted
    return whole


def _told(aborted: Aborted) -> ApiError:
    if aborted.why == "gone":
        return ApiError(GONE, "The client closed the connection.")
    if aborted.why == "late":
        return ApiError(504, "The answer took longer than this server allows.", code="timeout")
    return ApiError(503, "The client did not read what was sent.")
