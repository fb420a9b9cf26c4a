"""Some thousand bodies that a client might send by mistake or malice: an answer or one error object each, never a 500."""

import asyncio
import copy
import json
import random

import httpx
import pytest

from ktransformers.server.app import create_app
from tests.server.support import HELLO, saying, service

GOOD = {
    "/v1/chat/completions": {
        "model": "tiny", "messages": [{"role": "system", "content": "S"}, *HELLO], "max_tokens": 4, "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "stop": ["x"], "n": 1, "stream": False, "seed": 3, "logprobs": True, "top_logprobs": 2,
        "logit_bias": {"5": 1}, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tool_choice": "auto",
        "response_format": {"type": "text"}, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low", "parallel_tool_calls": True,
    },
    "/v1/completions": {
        "model": "tiny", "prompt": ["a b", "c"], "max_tokens": 4, "echo": True, "logprobs": 2, "stop": "x", "n": 2, "stream": True,
        "best_of": 2, "suffix": None, "repetition_penalty": 1.1, "stop_token_ids": [7], "min_tokens": 1, "ignore_eos": False,
    },
    "/v1/responses": {
        "model": "tiny", "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                                   {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                                   {"type": "function_call_output", "call_id": "c", "output": "x"},
                                   {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]}],
        "instructions": "I", "max_output_tokens": 4, "stream": True, "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": "auto", "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
    },
    "/v1/messages": {
        "model": "tiny", "max_tokens": 4, "system": [{"type": "text", "text": "S"}], "stream": True, "stop_sequences": ["x"],
        "messages": [*HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}},
                                                               {"type": "thinking", "thinking": "h"}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled"},
    },
    "/v1/messages/count_tokens": {"messages": HELLO, "system": "S"},
    "/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip

ODD = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**18, 10**40, -(10**40), "", "a", "0", "\x00", "\ud800", "ü🙂", "a" * 3000, "<|end|>",
    [], [[]], [None], ["a"], [1], [-1], [10**9], {}, {"a": 1}, {"": None}, {"type": "text"}, {"type": []}, [{}], [[1], ["a"]],
    float("nan"), float("inf"), {"type": "text", "text": 5}, {"role": "user"}, "{{ 7 * 7 }}", "../../etc/passwd", [["a"] * 50] * 3,
]  # fmt: skip


def spots(value, path=()):
    """Every place in a value, as the keys that lead there."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from spots(each, (*path, key))


def spoiled(value, chance):
    """A copy with something odd in one to three places, or without something."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice(list(spots(value))[1:] or [()])
        if not path:
            return copy.deepcopy(chance.choice(ODD))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and chance.random() < 0.15:
            del holder[path[-1]]
        elif isinstance(holder, dict) and chance.random() < 0.1:
            holder[chance.choice(["x", "", "audio", "functions", "best_of", "guided_json", "grammar", "structured_outputs"])] = copy.deepcopy(chance.choice(ODD))
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice(ODD))
    return value


def encoded(value, chance):
    data = json.dumps(value).encode()
    if chance.random() < 0.1:  # bytes that are wrong anywhere
        at = chance.randrange(len(data) + 1)
        data = data[:at] + chance.choice([b"\xff", b"\x00", b"{", b"]", b"", b'"', b"\xed\xa0\x80"]) + data[at + chance.randrange(3) :]
    return data


@pytest.mark.parametrize("seed", range(4))
def test_no_body_is_more_than_the_server_can_bear(seed):
    chance = random.Random(seed)
    one = service(says=saying("a x b"))
    app = create_app(one)

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for _ in range(800):
                path = chance.choice(list(GOOD))
                data = encoded(spoiled(GOOD[path], chance), chance)
                response = await client.post(path, content=data, headers={"content-type": "application/json"})
                check(path, data, response)

    asyncio.run(run())
    assert one.served.engine.load().running == one.served.engine.load().waiting == 0, "something was left behind"


def check(path, data, response):
    what = (path, data[:2000], response.status_code, response.text[:500])
    assert response.status_code in (200, 400, 413), what
    if response.status_code != 200:
        assert response.json()["error"]["message"], what
    elif "event-stream" in response.headers["content-type"]:
        assert '"error":{' not in response.text, what


def test_the_bodies_that_are_spoiled_are_good():
    one = service(says=saying("a x b"))

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(one)), base_url="http://test") as client:
            for path, body in GOOD.items():
                response = await client.post(path, json=body)
                assert response.status_code == 200, (path, response.text)

    asyncio.run(run())
