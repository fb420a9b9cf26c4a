"""What the endpoints share: settings, the model once it is loaded, keys and metrics. Nothing here is global."""

import asyncio
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import GenerationConfig

from ktransformers.engine.requests import Engine, Load
from ktransformers.server.errors import ApiError
from ktransformers.server.inbox import Bell
from ktransformers.server.keys import Keys
from ktransformers.server.machine import Machine
from ktransformers.server.metrics import Metrics
from ktransformers.server.vocabulary import Vocabulary

T = TypeVar("T")

_INLINE = 20_000
"""Characters that are turned into tokens where they came, in about 10 ms; more would hold up everybody's stream."""


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    body_bytes: int = 32 << 20
    all_bodies_bytes: int = 512 << 20
    """Of all requests that are being answered."""
    body_seconds: float = 60.0
    """For a body to arrive."""
    request_seconds: float = 0.0
    """For a whole request; 0: as long as it takes."""
    choices: int = 128
    """Answers: prompts times `n`."""
    stops: int = 16
    stop_length: int = 1000
    unread_events: int = 16384
    """Of a reader that has fallen behind."""


@dataclass(frozen=True)
class Settings:
    """How the server was started. `names`: of the model, the first is its own. `adapters`: name -> what its file is
    called; where there are any, names are strict, or a misspelt one would be answered without its adapter."""

    names: tuple[str, ...] = ("ktransformers",)
    strict_names: bool = False
    cors: tuple[str, ...] = ()
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)
    adapters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A loaded model. `facts`: what /props tells of it, in JSON types; `machine`: what /kt/machine does. `after`: is
    called when the engine has ended."""

    engine: Engine
    tokenizer: Any
    vocab_size: int
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    facts: Mapping[str, Any] = field(default_factory=dict)
    after: Callable[[], None] = lambda: None
    machine: Machine = field(default_factory=Machine)


class Service:
    """One server. `served` is None until the model is loaded."""

    def __init__(
        self, settings: Settings | None = None, served: Served | None = None, keys: Keys | None = None
    ) -> None:
        self.settings, self.served, self.keys = settings or Settings(), served, keys or Keys()
        self.metrics = Metrics(self._load)
        self._texts = ThreadPoolExecutor(1, "tokenizer")  # a tokenizer of transformers is not for two threads
        self._bell: Bell | None = None
        self._vocabulary: Vocabulary | None = None
        self._longest_token = 0

    def _load(self) -> Load | None:
        return self.served.engine.load() if self.served else None

    def ready(self) -> Served:
        """The model. Raises ApiError while it is being loaded."""
        if self.served is None:
            raise ApiError(503, "The model is being loaded. Ask again later.", headers={"Retry-After": "5"})
        return self.served

    def names(self) -> list[str]:
        """All names that a request may give."""
        return [*self.settings.names, *self.settings.adapters]

    def name_for(self, asked: str | None) -> str:
        """The name that an answer carries for the one that was asked. Raises ApiError where names are strict."""
        if asked in self.names():
            return asked
        if (self.settings.strict_names or self.settings.adapters) and asked is not None:
            known = ", ".join(self.names())
            raise ApiError(
                404, f"model {asked[:200]!r} is not served here, expected one of: {known}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        return self.settings.names[0]

    def adapter_for(self, asked: str | None) -> str:
        """The adapter that computes for a name that was asked; "" for the model's own names."""
        return asked if asked in self.settings.adapters else ""

    def bell(self) -> Bell:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = Bell(loop)
        return self._bell

    def vocabulary(self) -> Vocabulary:
        """The text of single tokens."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.ready().tokenizer)
        return self._vocabulary

    def check_fits(self, characters: int) -> None:
        """Raises ApiError for a prompt of so many characters that no tokens could be long enough: to count those of a
        million words takes seconds. Half as many may fit by a normalizer that drops some."""
        served = self.ready()
        if self._longest_token == 0:
            self._longest_token = max(map(len, served.tokenizer.get_vocab()), default=1)
        if characters > 2 * self._longest_token * served.engine.context:
            raise ApiError(
                400, f"The prompt has {characters} characters, more than the context of {served.engine.context} tokens "
                "can hold. Shorten it.", code="context_length_exceeded",
            )  # fmt: skip

    async def text_work(self, size: int, work: Callable[[], T], long: bool = False) -> T:
        """What `work` returns, which takes time by `size`, in characters; `long` work in a thread of its own."""
        if size <= _INLINE and not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    def close(self) -> None:
        """End what this holds. The engine is closed by whoever made it."""
        self._texts.shutdown(wait=False, cancel_futures=True)


def is_request_id(text: str) -> bool:
    """Whether a client's own id of a request can be taken over into headers and logs."""
    return re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", text) is not None
