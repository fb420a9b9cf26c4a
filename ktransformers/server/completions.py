"""/v1/completions: texts or token ids go on, with the log-probabilities of both prompt and answer."""

import functools
import itertools
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request, Response

from ktransformers.engine.detokenize import Detokenizer, special_ids
from ktransformers.engine.requests import Logprobs, Prompt
from ktransformers.server import prompts, scores, wishes
from ktransformers.server.chat import FINGERPRINT, note_prompt
from ktransformers.server.choice import Delta
from ktransformers.server.encoding import JsonResponse
from ktransformers.server.errors import ApiError, error_object
from ktransformers.server.forms import constraint_of, form_of
from ktransformers.server.prompts import Prompted
from ktransformers.server.run import Asked, Run, Started, Update, Usage
from ktransformers.server.schemas import CompletionRequest
from ktransformers.server.service import Served, Service
from ktransformers.server.streaming import DONE, EventStream, event, gathered

NEW_TOKENS = 16
"""Of an answer where the request does not say; OpenAI's."""


async def answer(service: Service, body: CompletionRequest, request: Request) -> Response:
    """The endpoint."""
    served, limits, name = service.ready(), service.settings.limits, service.name_for(body.model)
    given = _given(body)
    if len(given) * (body.n or 1) > limits.choices:
        text = f"prompt: {len(given)} prompts times n are more than {limits.choices} answers, the most at once."
        raise ApiError(400, text, param="prompt")
    stops = wishes.stops_for(body, served, limits)
    size = sum(map(len, given))
    service.check_fits(max(map(len, given)))
    form = form_of(body)
    if body.echo and body.logprobs is not None and body.max_tokens == 1:
        # Whoever scores a text, as lm-eval does, counts on one new token after the prompt's; a stop token has no
        # log-probability where it ends an answer.
        body = body.model_copy(update={"ignore_eos": True})
    prompted = await service.text_work(size, functools.partial(_prepared, served, body, given, form), bool(form))
    for prompt in prompted:
        note_prompt(service, prompt.text)
    requests = wishes.requests_for(
        served, body, prompted, NEW_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None,
        adapter=service.adapter_for(body.model),
    )  # fmt: skip
    run = Run(service, Asked(prompted, requests, stops, joined=True))
    shape = Shape(service, body, name, prompted)
    run.start()
    if body.stream:
        return EventStream(run, CompletionFrames(shape, run.n, body))
    whole = await gathered(run, request)
    choices = [shape.choice(delta, whole.prompts[delta.choice // run.n]) for delta in whole.choices]
    usage = run.usage()
    return JsonResponse(shape.head | {"choices": choices, "usage": usage.openai(), "kt": usage.kt()})


def _given(body: CompletionRequest) -> list[str] | list[list[int]]:
    """A list of prompts, whatever was sent."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if not prompt or isinstance(prompt[0], int) else prompt


def _prepared(served: Served, body: CompletionRequest, given: list[Any], form: Mapping[str, Any]) -> list[Prompted]:
    found = [
        prompts.of_text(served.tokenizer, one, body.add_special_tokens)
        if isinstance(one, str)
        else prompts.of_ids(served.tokenizer, one, served.vocab_size)
        for one in given
    ]
    return [replace(prompt, constraint=constraint_of(served, form, prompt.text)) for prompt in found]


class Shape:
    """The objects of one answer."""

    def __init__(self, service: Service, body: CompletionRequest, name: str, prompted: list[Prompted]) -> None:
        self._service, self._body, self._prompted = service, body, prompted
        self._n = body.n or 1
        self.head = {
            "id": "cmpl-" + secrets.token_hex(12), "object": "text_completion", "created": int(time.time()),
            "model": name, "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def choice(self, delta: Delta, prompt: Prompt | None, before: int | None = None) -> dict[str, Any]:
        """The object of what is new in an answer: with `prompt`, which is echoed if that was asked for, all of it from
        the beginning. `before`: characters that the client has already."""
        echoed = self._prompted[delta.choice // self._n].text if self._body.echo and prompt is not None else ""
        start = len(echoed) if before is None else before
        logprobs = None
        if self._body.logprobs is not None:
            own = ((one.id, one.logprobs, start + one.start) for one in delta.scored)
            echo = self._of_prompt(delta.choice, prompt) if echoed else ()
            logprobs = scores.of_completion(self._service.vocabulary(), itertools.chain(echo, own))
        return {
            "index": delta.choice, "text": echoed + delta.text, "logprobs": logprobs, "finish_reason": delta.finish,
        }  # fmt: skip

    def _of_prompt(self, choice: int, prompt: Prompt) -> Iterator[tuple[int, Logprobs | None, int]]:
        prompted, tokenizer = self._prompted[choice // self._n], self._service.ready().tokenizer
        special = special_ids(tokenizer)
        words = Detokenizer(tokenizer, special)
        for token, logprobs in zip(prompted.ids, [None, *prompt.logprobs], strict=False):
            yield token, logprobs, len(words.text)
            words.add(token)
            if not prompted.text.startswith(words.text[: len(prompted.text)]) and len(words.ids) == 1:
                words = Detokenizer(tokenizer, special)  # the tokenizer put it there, before the text

    def echoed(self, choice: int) -> int:
        """Characters of the prompt that the answer begins with."""
        return len(self._prompted[choice // self._n].text) if self._body.echo else 0


class CompletionFrames:
    """Chunks: the echoed prompt where it was asked for, what comes, usage where it was asked for."""

    def __init__(self, shape: Shape, n: int, body: CompletionRequest) -> None:
        self._shape, self._n, self._echo = shape, n, bool(body.echo)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)

    def update(self, update: Update) -> bytes:
        if isinstance(update, Started):
            first = update.source * self._n
            echoes = range(first, first + self._n) if self._echo else ()
            return b"".join(self._chunk(self._shape.choice(Delta(i), update.prompt)) for i in echoes)
        return self._chunk(self._shape.choice(update, None, self._shape.echoed(update.choice)))

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return event(self._shape.head | {"choices": [choice]} | ({"usage": None} if self._usage else {}))

    def closing(self, usage: Usage) -> bytes:
        last = {"choices": [], "usage": usage.openai(), "kt": usage.kt()}
        return (event(self._shape.head | last) if self._usage else b"") + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error_object(error, "")) + DONE
