"""From what a client asks for to what the engine is asked: sampling, lengths, stop strings."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from ktransformers.engine.requests import Request
from ktransformers.engine.sampling import Sampling
from ktransformers.server.errors import ApiError
from ktransformers.server.prompts import Prompted
from ktransformers.server.schemas import Sampled
from ktransformers.server.service import Limits, Served

_COLDEST = 1e-4
"""Below this temperature scores outgrow float32, and chance has no say anyway."""


def sampling_for(served: Served, wishes: Sampled) -> Sampling:
    """The model's generation_config with what the request says instead.

    Tokens are drawn by chance where the config says so or the request asks for it: by a temperature above 0, by top_p,
    top_k or min_p, or by several answers. OpenAI draws unless temperature is 0; here a request that says nothing is
    answered as `kt chat` answers.
    """
    config = copy.deepcopy(served.generation_config)
    config.stop_strings, config.max_new_tokens, config.max_length = None, None, None  # the server sees to them
    config.top_k = config.top_k or 0  # transformers' own default is 50, which nobody here has asked for
    drawn = any(value is not None for value in (wishes.top_p, wishes.top_k, wishes.min_p)) or (wishes.n or 1) > 1
    config.do_sample = bool(config.do_sample) or drawn
    if wishes.temperature is not None:
        config.do_sample = wishes.temperature >= _COLDEST
        config.temperature = max(wishes.temperature, _COLDEST)
    for name in ("top_p", "min_p", "repetition_penalty"):
        if getattr(wishes, name) is not None:
            setattr(config, name, getattr(wishes, name))
    if wishes.top_k is not None:
        config.top_k = max(wishes.top_k, 0)
    if wishes.min_tokens:
        config.min_new_tokens = wishes.min_tokens
    return _ending(config, served.tokenizer, wishes)


def _ending(config: GenerationConfig, tokenizer: Any, wishes: Sampled) -> Sampling:
    stop_ids = set(wishes.stop_token_ids or ())
    if wishes.ignore_eos:
        config.eos_token_id = None
    elif tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    return Sampling(config, stop_ids)


def stops_for(wishes: Sampled, served: Served, limits: Limits) -> tuple[str, ...]:
    """The stop strings of a request, and those of the model's generation_config."""
    given = [wishes.stop] if isinstance(wishes.stop, str) else wishes.stop or []
    own = served.generation_config.stop_strings or []
    if len(given) > limits.stops:
        raise ApiError(400, f"stop: found {len(given)} strings, expected at most {limits.stops}.", param="stop")
    if any(not 1 <= len(text) <= limits.stop_length for text in given):
        raise ApiError(400, f"stop: expected strings of 1 to {limits.stop_length} characters.", param="stop")
    return tuple(dict.fromkeys([*given, *([own] if isinstance(own, str) else own)]))


def bias_for(wishes: Sampled, vocab_size: int) -> dict[int, float]:
    """`logit_bias` with numbers for keys."""
    found = {}
    for key, value in (wishes.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            text = f"logit_bias: found {key[:50]!r}, expected token ids below {vocab_size}."
            raise ApiError(400, text, param="logit_bias")
        found[int(key)] = value
    return found


def length_for(served: Served, prompt: int, wanted: int | None) -> int:
    """Most tokens of an answer to `prompt` tokens: what is wanted, and fits. Raises ApiError where nothing fits."""
    room = served.engine.context - prompt
    if room < 0 or room == 0 and wanted != 0:
        raise ApiError(
            400, f"The prompt has {prompt} tokens; the context is {served.engine.context} tokens for prompt and answer "
            "together. Shorten it.", code="context_length_exceeded",
        )  # fmt: skip
    wanted = served.generation_config.max_new_tokens if wanted is None else wanted
    return room if wanted is None else min(wanted, room)


def requests_for(
    served: Served, wishes: Sampled, prompts: Sequence[Prompted], wanted: int | None, *, logprobs: int | None = None,
    prompt_logprobs: int | None = None, adapter: str = "",
) -> list[Request]:  # fmt: skip
    """One request to the engine for each prompt."""
    sampling, bias = sampling_for(served, wishes), bias_for(wishes, served.vocab_size)
    if any(token >= served.vocab_size for token in wishes.stop_token_ids or ()):
        text = f"stop_token_ids: expected ids below {served.vocab_size}."
        raise ApiError(400, text, param="stop_token_ids")
    seed = None if wishes.seed is None else wishes.seed % (1 << 62)  # the engine counts on from it
    return [
        Request(
            prompt.ids, length_for(served, len(prompt.ids), wanted), sampling, seed=seed, n=wishes.n or 1,
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, bias=bias, constraint=prompt.constraint,
            frequency_penalty=wishes.frequency_penalty or 0.0, presence_penalty=wishes.presence_penalty or 0.0,
            priority=wishes.priority or 0, adapter=adapter,
        )
        for prompt in prompts
    ]  # fmt: skip
