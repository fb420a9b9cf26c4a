"""The engine of a server: one thread that owns a model and answers requests by continuous batching (schedule.py)."""

import itertools
import logging
import threading
import time

from torch import nn

from ktransformers.configs import text_config
from ktransformers.engine.forms import Forms
from ktransformers.engine.requests import Closing, Listener, Load, QueueFull, Request
from ktransformers.engine.schedule import Prefixes, Schedule, Ticket
from ktransformers.errors import KTransformersError

_log = logging.getLogger(__name__)
MOST_ANSWERS = 128
"""To one prompt."""


class BatchingEngine:
    """Answers requests to `model`, which no other thread may touch until `close`.

    Args:
        model: a causal LM, injected or not.
        max_running: answers that get tokens, or whose prompts are computed, at a time.
        max_waiting: requests that may wait besides.
        chunk_size: prompt tokens computed between two tokens of those that run.
        context: most tokens of prompt and answer together; None is what the model's config says.
        cache_bytes: what keys and values may take, those of `prefixes` too; None: no limit.
        prefixes: keeps beginnings of prompts from one request to the next.
        forms: the model with its adapters, which requests name; None: it has none.

    Raises:
        KTransformersError: sizes out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_running: int = 16,
        max_waiting: int = 1024,
        chunk_size: int = 512,
        context: int | None = None,
        cache_bytes: int | None = None,
        prefixes: Prefixes | None = None,
        forms: Forms | None = None,
    ) -> None:
        sizes = {"max_running": max_running, "chunk_size": chunk_size, "context": context, "cache_bytes": cache_bytes}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise KTransformersError(f"{name}: found {value}, expected at least 1.")
        config = text_config(model.config)
        known = getattr(config, "max_position_embeddings", None)
        if known is not None and (context or 0) > known:
            raise KTransformersError(f"context: found {context}, the model takes {known} tokens. Give at most that.")
        self.context: int = context or known or 1 << 20
        self.vocabulary: int = config.vocab_size
        self._schedule = Schedule(model, max_running, chunk_size, self.context, cache_bytes, prefixes, forms)
        self._most_waiting = max_waiting
        self._changed = threading.Condition()
        self._arrived: list[Ticket] = []
        self._orders = itertools.count()
        self._closing = self._closed = False
        self._idle = True
        self._thread = threading.Thread(target=self._run, name="kt-engine", daemon=True)
        self._thread.start()

    # --- from any thread --------------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """As `requests.Engine` has it."""
        self._check(request)
        with self._changed:
            if self._closing:
                raise Closing("The engine is shutting down and takes no more requests.")
            if len(self._arrived) + self._schedule.load.waiting >= self._most_waiting:
                raise QueueFull(f"{self._most_waiting} requests are waiting already. Ask again later.")
            ticket = Ticket(request, listener, next(self._orders))
            self._arrived.append(ticket)
            self._changed.notify_all()
        return ticket

    def _check(self, request: Request) -> None:
        ids, last = request.ids, self.vocabulary - 1
        if not ids:
            raise KTransformersError("prompt: found no tokens, expected at least one.")
        for name, tokens in (("prompt", ids), ("bias", request.bias)):
            odd = next((token for token in tokens if not isinstance(token, int) or not 0 <= token <= last), None)
            if odd is not None:
                raise KTransformersError(f"{name}: found token {odd!r}, expected numbers from 0 to {last}.")
        if len(ids) + min(1, request.max_new_tokens) > self.context:
            raise KTransformersError(
                f"prompt: found {len(ids)} tokens; the context takes {self.context}, the answer's included. Shorten it."
            )
        if request.max_new_tokens < 0 or not 1 <= request.n <= MOST_ANSWERS:
            found = f"found {request.max_new_tokens} and {request.n}"
            raise KTransformersError(f"max_new_tokens and n: {found}, expected at least 0, and 1 to {MOST_ANSWERS}.")
        adapters = self._schedule.forms.names
        if request.adapter and request.adapter not in adapters:
            known = ", ".join(adapters) or "none at all"
            raise KTransformersError(f"adapter: found {request.adapter!r}, expected one of: {known}.")
        limit, needed = self._schedule.limit, self._schedule.bytes_of(len(ids) + 1)
        if limit is not None and needed > limit:
            raise KTransformersError(
                f"prompt: {len(ids)} tokens take {needed:,} bytes of keys and values, the limit is {limit:,}. Shorten "
                "the prompt, or raise the limit."
            )

    def load(self) -> Load:
        """What it is busy with."""
        return self._schedule.load

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for those that were taken; whether all have ended in time."""
        until = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            while not self._idle or self._arrived:
                left = until - time.monotonic()
                if left <= 0 or not self._thread.is_alive():
                    return False
                self._changed.wait(left)
        return True

    def close(self) -> None:
        """Cancel what has not ended, and end the thread."""
        with self._changed:
            self._closing = self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle = self._schedule.is_empty and not self._arrived
                if self._idle:
                    self._changed.notify_all()
                while not self._closed and self._schedule.is_empty and not self._arrived:
                    self._changed.wait()
                arrived, self._arrived, self._idle = self._arrived, [], False
            for ticket in arrived:
                self._schedule.add(ticket)
            if self._closed:
                break
            try:
                self._schedule.step()
            except Exception as error:  # a defect of ours: nobody may wait for ever
                _log.exception("A step of the engine failed.")
                self._schedule.end_all("error", f"the engine failed: {error or type(error).__name__}")
        self._schedule.end_all("cancelled")
        with self._changed:
            self._idle = True
            self._changed.notify_all()
