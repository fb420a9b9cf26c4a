"""What is asked of the engine and what it says back: token ids in, events out. No threads, no model, no text.

Whoever asks turns text into ids before, and ids into text afterwards; stop strings, tools and schemas are his too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from ktransformers.engine.sampling import Sampling
from ktransformers.errors import KTransformersError

Reason = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop token, `max_new_tokens` or the context, somebody's wish, a failure."""


class QueueFull(KTransformersError):
    """As many requests are waiting as may wait: ask again later."""


class Closing(KTransformersError):
    """The engine takes no more requests."""


class Constraint(Protocol):
    """Says which tokens may come next, such as those of a grammar. One for each answer; used by one thread."""

    def mask(self, scores: Tensor) -> None:
        """Set the scores, float32 [V], of all tokens that may not come next to -inf."""

    def accept(self, token: int) -> bool:
        """A token was chosen; whether the answer must end with it."""


@dataclass(frozen=True)
class Request:
    """A prompt of token ids, and how to go on.

    Args:
        ids: at least one token.
        max_new_tokens: most tokens to choose; 0 is for `prompt_logprobs` alone.
        sampling: temperature, top-k and all else that a GenerationConfig says, and stop tokens.
        seed: of each answer's own numbers of chance: answer i of `n` takes seed + i. None: another each time.
        n: answers to one prompt, which is computed once.
        logprobs: with each token its log-probability and those of so many likeliest ones; None: none at all.
        prompt_logprobs: the same for the tokens of the prompt, but the first. The prompt is then computed whole.
        bias: token -> what is added to its score.
        frequency_penalty, presence_penalty: taken from a token's score, times how often the answer has it, and once.
        constraint: makes the constraint of one answer.
        priority: lower comes first; among equals, who came first.
        adapter: name of the adapter that computes with the model; "": none.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    constraint: Callable[[], Constraint] | None = None
    priority: int = 0
    adapter: str = ""


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities by the model's own logits: of the token, and (token, logarithm) of the
    likeliest in descending order."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The prompt is computed. `cached_tokens` of it were not computed again. `logprobs`: of each token but the first,
    where they were asked for."""

    cached_tokens: int
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True)
class Token:
    """A token of answer `index`. A stop token that ends the answer comes in `Done` alone."""

    index: int
    id: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Done:
    """Answer `index` has ended. `stop_id`: the stop token, where that ended it. `error`: what failed."""

    index: int
    reason: Reason
    stop_id: int | None = None
    error: str = ""


Event = Prompt | Token | Done
Listener = Callable[[Event], None]
"""Called in the engine's thread, in order: it must not wait, and what it raises ends the request."""


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self, index: int | None = None) -> None:
        """End all its answers that have not ended, or the one of that index, before the next step. From any thread, at
        any time."""


@dataclass(frozen=True)
class Load:
    """What the engine is busy with now, and what it has done since it started."""

    running: int
    """Answers that get tokens at every step."""
    waiting: int
    """Requests whose prompt is not computed yet."""
    cache_bytes: int
    cache_limit: int
    prompt_tokens: int = 0
    """Computed, without those from a cache."""
    cached_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class Engine(Protocol):
    """What a server needs of an engine; `engine.batching.BatchingEngine` is one."""

    context: int
    """Most tokens of prompt and answer together."""

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request; its events go to `listener`: one Prompt, Tokens, and a Done for each answer.

        From any thread. Raises QueueFull, Closing, and KTransformersError for a request that makes no sense: no
        tokens, one outside the vocabulary, a prompt longer than the context, sizes out of range, an unknown adapter.
        """

    def load(self) -> Load:
        """From any thread, at once."""

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait until those taken have ended; whether they did in time."""

    def close(self) -> None:
        """End all requests with reason "cancelled", and the engine's thread."""
