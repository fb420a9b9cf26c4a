"""Who gets the next step: prompts and answers of many requests on one model, in one thread.

A step decodes one token of every running answer, adapter by adapter (running.py), then computes one chunk of prompts,
so that nobody who gets tokens waits longer than a chunk. Prompts take turns, chunk by chunk, whatever their adapter.
Where keys and values outgrow their limit, prefixes that nobody uses go first; then what came last waits and is computed
again. The thread that calls this is batching.py's.
"""

import heapq
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from ktransformers.engine.answer import Answer, logprobs_of
from ktransformers.engine.cache import PrefixCache
from ktransformers.engine.forms import Forms
from ktransformers.engine.requests import Done, Listener, Load, Logprobs, Prompt, Reason, Request, Token
from ktransformers.engine.running import Running
from ktransformers.engine.step import Steps
from ktransformers.native.pages import PAGE
from ktransformers.operators.paged_cache import PagedCache, PagedLayer, PagedWindowLayer, paged_cache

_log = logging.getLogger(__name__)
_EVERY = 256
"""Tokens whose logits are all kept at once, where those of a prompt are asked for."""


class Prefixes(Protocol):
    """What keeps beginnings of prompts; `prefix_tree.PrefixTree` is one. `salt`: what computed them besides the model,
    an adapter's identity; what is kept under one is found under no other."""

    @property
    def nbytes(self) -> int:
        """Bytes of pages that are kept."""

    def lookup(self, ids: list[int], salt: bytes = b"") -> tuple[PagedCache | None, int]:
        """A cache of the longest beginning of `ids` that is kept, and its tokens; one of `ids` is left to compute."""

    def insert(self, ids: list[int], cache: PagedCache, *, salt: bytes = b"") -> int:
        """Keep the whole pages of a cache of `ids`; how many blocks are new."""

    def evict(self, nbytes: int) -> int:
        """Give back about so many bytes that nobody else uses; how many were."""


class Ticket:
    """A request that was taken, and whom to tell."""

    def __init__(self, request: Request, listener: Listener, order: int) -> None:
        self.request, self.listener, self.order = request, listener, order
        self.cancelled = self.told = False
        self.gone: set[int] = set()  # answers that were cancelled
        self.logprobs: list[Logprobs] = []  # of the prompt

    def cancel(self, index: int | None = None) -> None:
        """As `requests.Ticket` has it."""
        if index is None:
            self.cancelled = True
        else:
            self.gone.add(index)

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of all its tokens are wanted, now."""
        return self.request.prompt_logprobs is not None and not self.told

    def end(self, index: int, reason: Reason, stop_id: int | None = None, error: str = "") -> None:
        """Tell that an answer has ended. A listener that raises is not asked again."""
        try:
            self.listener(Done(index, reason, stop_id, error))
        except Exception:
            self.cancelled = True


class Member:
    """One answer of a ticket on its way, with the cache of its sequence."""

    def __init__(self, ticket: Ticket, index: int, model: nn.Module) -> None:
        self.ticket, self.index = ticket, index
        self.answer = Answer(ticket.request, index, model)
        self.steps = Steps(model, PrefixCache())
        self.cached = -1
        """Tokens that were in a cache when its prompt began; -1: it has not begun."""

    @property
    def ids(self) -> list[int]:
        """All tokens to compute before the next is chosen: the prompt's, and those chosen already."""
        return [*self.ticket.request.ids, *self.answer.ids]

    @property
    def adapter(self) -> str:
        return self.ticket.request.adapter

    @property
    def computed(self) -> int:
        return len(self.steps.cache.ids)

    @property
    def cancelled(self) -> bool:
        return self.ticket.cancelled or self.ticket.told and self.index in self.ticket.gone

    @property
    def key(self) -> tuple[int, int, int]:
        """Who comes first: lower."""
        return self.ticket.request.priority, self.ticket.order, self.index

    def __lt__(self, other: "Member") -> bool:
        return self.key < other.key


class Schedule:
    """All answers that have not ended: waiting, of which the prompt is computed, ready, running.

    Arguments are those of `BatchingEngine`.
    """

    def __init__(
        self, model: nn.Module, most: int, chunk_size: int, context: int, limit: int | None, prefixes: Prefixes | None,
        forms: Forms | None = None,
    ) -> None:  # fmt: skip
        self.model, self.prefixes, self.limit = model, prefixes, limit
        self._most, self._chunk, self._context = most, chunk_size, context
        self._waiting: list[Member] = []  # a heap
        self._prompts: deque[Member] = deque()
        self._ready: deque[Member] = deque()
        self.forms = forms or Forms(model)
        self._running = Running(self.forms)
        self._page_bytes = 0  # of a page in all layers; known when one was filled
        fresh = None if prefixes is None else paged_cache(model)
        self._has_states = fresh is not None and not all(isinstance(layer, PagedLayer) for layer in fresh.layers)
        self.load = Load(0, 0, 0, limit or 0)

    @property
    def is_empty(self) -> bool:
        return not (self._waiting or self._prompts or self._ready or self._running)

    def add(self, ticket: Ticket) -> None:
        """Let a request wait for its turn."""
        try:
            heapq.heappush(self._waiting, Member(ticket, 0, self.model))
        except Exception as error:  # sampling or a constraint of no sense
            for index in range(ticket.request.n):
                ticket.end(index, "error", error=_said(error))

    def step(self) -> None:
        """One token more of each running answer, and a chunk of prompts."""
        self._forget_cancelled()
        self._admit()
        self._decode()
        self._compute_prompts()
        while self._ready and len(self._running) < self._most:
            self._running.add(self._ready.popleft())
        self._count(steps=1)

    def end_all(self, reason: Reason, error: str = "") -> None:
        """Everybody is told that his answer has ended, and nothing is left of what was computed."""
        gone = [*self._waiting, *self._begun()]
        self._waiting = []
        self._running.clear()
        self._prompts.clear()
        self._ready.clear()
        for member in gone:
            self._end(member, reason, error=error)
        self._count()

    def _begun(self) -> Iterator[Member]:
        yield from self._prompts
        yield from self._ready
        yield from self._running

    def _count(self, **more: int) -> None:
        counts = {name: getattr(self.load, name) + count for name, count in more.items()}
        used, waiting = self._used(), len(self._waiting) + len(self._prompts)
        self.load = replace(self.load, running=len(self._running), waiting=waiting, cache_bytes=used, **counts)

    def _end(self, member: Member, reason: Reason, stop_id: int | None = None, error: str = "") -> None:
        member.ticket.end(member.index, reason, stop_id, error)
        if not member.ticket.told:  # nor will the others of its request be made
            for index in range(1, member.ticket.request.n):
                member.ticket.end(index, reason, error=error)

    def _forget_cancelled(self) -> None:
        gone = [member for member in (*self._waiting, *self._begun()) if member.cancelled]
        if gone:
            self._take_out(gone)
            self._waiting = [member for member in self._waiting if member not in gone]  # others may be cancelled by now
            heapq.heapify(self._waiting)
            for member in gone:
                self._end(member, "cancelled")

    def _take_out(self, gone: list[Member]) -> None:
        """Of prompts, of those ready, and of the batch, which gives each its cache back."""
        self._running.take_out(gone)
        self._prompts = deque(member for member in self._prompts if member not in gone)
        self._ready = deque(member for member in self._ready if member not in gone)

    # --- memory -----------------------------------------------------------------------------------------

    def bytes_of(self, tokens: int) -> int:
        """What the keys and values of so many tokens take at most, in whole pages; 0 while that is not known."""
        return -(-tokens // PAGE) * self._page_bytes

    def _used(self) -> int:
        held = sum(self.bytes_of(member.computed) for member in self._begun())
        return held + (0 if self.prefixes is None else self.prefixes.nbytes)

    def _has_room(self, more: int) -> bool:
        """Whether so many bytes more fit in, if prefixes that nobody uses make room."""
        over = 0 if self.limit is None else self._used() + more - self.limit
        if over > 0 and self.prefixes is not None:
            over -= self.prefixes.evict(over)
        return over <= 0

    def _learn_sizes(self, cache: Any) -> None:
        if not self._page_bytes and type(cache) is PagedCache:
            pages = (layer.pages for layer in cache.layers if isinstance(layer, PagedLayer))
            self._page_bytes = sum(each.page_bytes for each in pages if each is not None)

    def _make_room(self) -> None:
        """While the next step needs more pages than there may be, who came last has to wait; one alone has to end."""
        while self.limit is not None and self._running:
            full = sum(member.computed % PAGE == 0 for member in self._running)
            if self._has_room(full * self._page_bytes):
                return
            *others, last = sorted(self._begun())
            self._take_out([last])
            self._keep(last)
            if not others:
                self._end(last, "length")
                return
            last.steps, last.cached = Steps(self.model, PrefixCache()), -1
            heapq.heappush(self._waiting, last)
            self._count(preemptions=1)

    def _keep(self, member: Member) -> None:
        """Its whole pages, for who begins alike."""
        held = member.steps.cache
        if self.prefixes is not None and type(held.cache) is PagedCache:
            self.prefixes.insert(held.ids, held.cache, salt=self.forms.identity(member.adapter))

    # --- answers ----------------------------------------------------------------------------------------

    def _decode(self) -> None:
        self._make_room()
        for adapter in self._running.adapters:
            self._decode_those_of(adapter)

    def _decode_those_of(self, adapter: str) -> None:
        members = self._running.members(adapter)
        try:
            logits = self._running.step(adapter)
        except Exception as error:  # nobody's alone, and what was computed of all is torn
            _log.exception("A step of %d answers failed.", len(members))
            for member in self._running.drop(adapter):
                self._end(member, "error", error=_said(error))
            return
        ended = [m for m, scores in zip(members, logits, strict=True) if not self._goes_on(m, scores)]
        self._take_out(ended)
        for member in ended:
            self._keep(member)

    def _goes_on(self, member: Member, logits: Tensor) -> bool:
        """Choose the next token and tell it; whether another one follows."""
        ticket, answer = member.ticket, member.answer
        try:
            token, logprobs = answer.choose(logits)
            if token in ticket.request.sampling.stop_ids:
                self._end(member, "stop", token)
                return False
            self._count(new_tokens=1)
            ticket.listener(Token(member.index, token, logprobs))
            if not answer.is_full and len(ticket.request.ids) + len(answer.ids) < self._context:
                return True
            self._end(member, "stop" if answer.is_complete else "length")
        except Exception as error:  # a listener's, a constraint's, NaN: this answer's own
            self._end(member, "error", error=_said(error))
        return False

    # --- prompts ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin with prompts while there is room for them."""
        while self._waiting and sum(1 for _ in self._begun()) < self._most:
            if not self._has_room(self.bytes_of(len(self._waiting[0].ids) + 1)) and any(self._begun()):
                return
            self._prompts.append(heapq.heappop(self._waiting))

    def _compute_prompts(self) -> None:
        left = self._chunk
        while left > 0 and self._prompts:
            member = self._prompts.popleft()
            try:
                before = member.computed if member.cached >= 0 else self._begin(member)
                logits = self._computed(member, left)
                left -= member.computed - before
                if member.computed < len(member.ids):
                    self._prompts.append(member)
                else:
                    self._is_computed(member, logits)
            except Exception as error:
                self._end(member, "error", error=_said(error))

    def _begin(self, member: Member) -> int:
        """Start from what is kept of its beginning; how many tokens that has."""
        member.cached, held = 0, member.steps.cache
        if self.prefixes is not None and not member.ticket.scores_prompt:
            salt = self.forms.identity(member.adapter)
            held.cache, member.cached = self.prefixes.lookup(member.ids, salt)
            held.ids = member.ids[: member.cached]
        self._count(cached_tokens=member.cached)
        return member.cached

    def _computed(self, member: Member, most: int) -> Tensor:
        """Logits [T, V] after the next tokens of its prompt: of the last one, or of each."""
        ids, ticket, begin = member.ids, member.ticket, member.computed
        every = ticket.scores_prompt
        held = member.steps.cache
        self.forms.use(member.adapter)
        if self.prefixes is not None:
            _record(held.cache, True)
        most = min(most, _EVERY) if every else most
        whole = min(begin + most, len(ids) - 1) // PAGE * PAGE  # where the states of delta nets can be kept
        most = whole - begin if self._has_states and whole > begin else most
        logits = member.steps.chunk(ids, most, every)
        self._learn_sizes(held.cache)
        if every:
            following = ids[begin + 1 : member.computed + 1]
            ticket.logprobs += logprobs_of(logits[: len(following)], following, ticket.request.prompt_logprobs)
        if self.prefixes is not None:
            self._keep(member)
            _record(held.cache, False)
        self._count(prompt_tokens=member.computed - begin)
        return logits

    def _is_computed(self, member: Member, logits: Tensor) -> None:
        """Tell so at the first time, and choose what follows; the same of the request's other answers."""
        ticket, members = member.ticket, [member]
        if not ticket.told:
            ticket.told = True
            ticket.listener(Prompt(member.cached, tuple(ticket.logprobs)))
            members += [Member(ticket, index, self.model) for index in range(1, ticket.request.n)]
        for other in members[1:]:
            other.cached = member.computed
            if not member.steps.share(other.steps):  # it computes the prompt for itself
                other.cached = -1
                heapq.heappush(self._waiting, other)
        if not ticket.request.max_new_tokens:
            for each in members:
                self._end(each, "length")
            return
        scores = logits[-1].clone()
        for each in members:
            if each.cached >= 0 and self._goes_on(each, scores):
                self._ready.append(each)


def _record(cache: Any, whether: bool) -> None:
    """Let windows keep what they leave behind, or forget it."""
    for layer in cache.layers if type(cache) is PagedCache else ():
        if isinstance(layer, PagedWindowLayer):
            layer.record_past = whether
            if not whether and layer.pages is not None:
                layer.advanced()


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
