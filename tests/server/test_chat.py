"""/v1/chat/completions: what is asked of the engine, and what the client gets."""

import pytest
from ktransformers.models import embedded_model
from transformers import AutoTokenizer, GenerationConfig

from ktransformers.server.service import Limits, Served, Service
from tests.server.fake_engine import FakeEngine
from tests.server.support import HELLO, TEXT, VOCABULARY, ask, events, ids, saying, served, service, tokenizer

PATH = "/v1/chat/completions"


def prompt_of(messages, **options):
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def sent(body, **options):
    """The request that reaches the engine."""
    one = service(**options)
    response = ask(one, PATH, {"messages": HELLO} | body)
    assert response.status_code == 200, response.text
    return one.served.engine.requests[0]


def refusal(body, status=400, **options):
    response = ask(service(**options), PATH, {"messages": HELLO} | body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---- answers -----------------------------------------------------------------------------------------------


def test_an_answer_has_text_reason_and_usage():
    found = ask(service(cached=5), PATH, {"messages": HELLO, "model": "alias"}).json()
    choice = found["choices"][0]
    assert choice["message"]["content"] == TEXT and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop" and found["model"] == "alias" and found["object"] == "chat.completion"
    prompt, new = len(prompt_of(HELLO)), len(ids(TEXT)) + 1  # the stop token was computed too
    assert found["usage"]["prompt_tokens"] == prompt and found["usage"]["completion_tokens"] == new
    assert found["usage"]["total_tokens"] == prompt + new
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 5} and found["kt"]["cached_tokens"] == 5


def test_a_stream_has_the_same_text_as_the_answer_in_one():
    found = events(ask(service(), PATH, {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}))
    assert found[-1] is None and found[-2]["choices"] == []
    assert found[-2]["usage"]["completion_tokens"] == len(ids(TEXT)) + 1
    assert found[-2]["kt"]["tokens_per_second"] > 0 and found[-2]["kt"]["seconds_to_first_token"] > 0
    chunks = found[:-2]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert len({chunk["id"] for chunk in found[:-1]}) == 1


def test_usage_is_in_a_stream_only_where_asked_for():
    found = events(ask(service(), PATH, {"messages": HELLO, "stream": True}))
    assert not any("usage" in chunk for chunk in found[:-1])


def test_several_answers_each_have_their_own_text():
    found = ask(service(says=saying("one", "two", "three")), PATH, {"messages": HELLO, "n": 3}).json()
    assert [choice["message"]["content"] for choice in found["choices"]] == ["one", "two", "three"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == len(prompt_of(HELLO))
    chunks = events(ask(service(says=saying("one", "two")), PATH, {"messages": HELLO, "n": 2, "stream": True}))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == ["one", "two"]


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_more_tokens_than_asked_for(limit, name):
    found = ask(service(), PATH, {"messages": HELLO, name: limit}).json()
    assert found["choices"][0]["message"]["content"] == tokenizer().decode(ids(TEXT)[:limit])
    assert found["choices"][0]["finish_reason"] == "length" and found["usage"]["completion_tokens"] == limit


def test_logprobs_have_bytes_and_the_likeliest():
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    content = ask(service(), PATH, body).json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == [tokenizer().decode([token]) for token in ids(TEXT)[:4]]
    assert all(one["logprob"] == -0.5 and [top["logprob"] for top in one["top_logprobs"]] == [-0.5, -1.5] for one in content)
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == tokenizer().decode(ids(TEXT)[:4])
    chunks = events(ask(service(), PATH, body | {"stream": True}))[:-1]
    streamed = [one for chunk in chunks if chunk["choices"][0]["logprobs"] for one in chunk["choices"][0]["logprobs"]["content"]]
    assert streamed == content


# ---- stop strings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["experts", ["x y z", "perts a", " are", "q"], "🙂"])
def test_nothing_of_a_stop_string_is_told_and_the_engine_stops(stop, stream):
    one = service(says=saying(TEXT + " and so on" * 80), step_seconds=0.001)
    body = {"messages": HELLO, "stop": stop, "stream": stream, "logprobs": True}
    response = ask(one, PATH, body)
    first = min((TEXT.index(text) + len(text), TEXT.index(text)) for text in ([stop] if isinstance(stop, str) else stop) if text in TEXT)[1]
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)[:-1]]
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        tokens = [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["content"]]
        assert chunks[-1]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
        assert choice["finish_reason"] == "stop"
    assert text == TEXT[:first]
    told = b"".join(bytes(one["bytes"]) for one in tokens)
    assert TEXT[:first].encode().startswith(told[: first]) and len(told) <= len(TEXT[:first].encode()) + 12
    assert one.served.engine.tickets[0].cancelled and one.served.engine.tickets[0].sent[0] < 200


def test_a_request_has_a_bounded_number_of_stop_strings():
    assert refusal({"stop": ["a"] * 17})["param"] == "stop"
    assert refusal({"stop": [""]})["param"] == "stop"
    assert refusal({"stop": "a" * 1001})["param"] == "stop"


# ---- what is asked of the engine ---------------------------------------------------------------------------


def test_the_prompt_is_what_the_template_makes():
    messages = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "There."}, *HELLO]
    assert list(sent({"messages": messages}).ids) == prompt_of(messages)


def test_parts_of_text_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = sent({"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]})
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "one\ntwo"}]
    assert list(request.ids) == prompt_of(plain)


def test_the_last_message_can_be_gone_on_with():
    messages = [*HELLO, {"role": "assistant", "content": "Experts are"}]
    request = sent({"messages": messages, "continue_final_message": True, "add_generation_prompt": False})
    assert tokenizer().decode(request.ids).endswith("<|assistant|>Experts are")
    assert "continue_final_message" in refusal({"continue_final_message": True})["message"]


def test_sampling_reaches_the_engine():
    body = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 7,
            "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": -100, "7": 3.5}, "n": 2,
            "stop_token_ids": [9], "min_tokens": 3, "priority": 4}  # fmt: skip
    request = sent(body)
    config = request.sampling.config
    assert config.do_sample and (config.temperature, config.top_p, config.top_k, config.min_p) == (0.7, 0.9, 40, 0.05)
    assert config.repetition_penalty == 1.1 and config.min_new_tokens == 3
    assert (request.seed, request.n, request.priority) == (7, 2, 4)
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -0.5)
    assert request.bias == {5: -100, 7: 3.5}
    assert request.sampling.stop_ids == {9, tokenizer().eos_token_id}


@pytest.mark.parametrize(
    ("body", "drawn"),
    [({}, False), ({"temperature": 0}, False), ({"temperature": 0, "top_p": 0.5}, False), ({"temperature": 1}, True),
     ({"top_p": 0.5}, True), ({"top_k": 5}, True), ({"n": 2}, True), ({"temperature": 1e-300}, False)],
)  # fmt: skip
def test_tokens_are_drawn_by_chance_where_that_is_asked_for(body, drawn):
    request = sent(body)
    assert request.sampling.config.do_sample is drawn
    assert request.sampling.config.top_k == body.get("top_k", 0), "transformers' own default is nobody's wish"


def test_what_the_request_leaves_out_is_as_the_model_says():
    config = GenerationConfig(do_sample=True, temperature=0.3, top_k=20, eos_token_id=[3], max_new_tokens=2, stop_strings=["R"])
    one = Service(served=Served(FakeEngine(saying(TEXT)), tokenizer(), VOCABULARY, config))
    assert ask(one, PATH, {"messages": HELLO}).json()["choices"][0]["message"]["content"] == ""
    request = one.served.engine.requests[0]
    used = request.sampling.config
    assert (used.do_sample, used.temperature, used.top_k, request.max_new_tokens) == (True, 0.3, 20, 2)
    assert request.sampling.stop_ids == {3, tokenizer().eos_token_id}
    assert config.stop_strings == ["R"], "the model's own is not changed"


def test_an_answer_has_the_room_that_the_prompt_leaves():
    room = 100 - len(prompt_of(HELLO))
    assert sent({}, context=100).max_new_tokens == room == sent({"max_tokens": 5000}, context=100).max_new_tokens
    error = refusal({"messages": [{"role": "user", "content": "word " * 200}]}, context=100)
    assert error["code"] == "context_length_exceeded"


def test_end_tokens_can_be_ignored():
    assert not sent({"ignore_eos": True}).sampling.stop_ids


def test_names_of_arguments_of_the_template_are_the_templates_own():
    assert sent({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"})
    for name in ("chat_template", "tokenize", "messages", "tools", "max_length"):
        assert name in refusal({"chat_template_kwargs": {name: "x"}})["message"]


# ---- what is refused ---------------------------------------------------------------------------------------

REFUSED = [
    ({"functions": [{"name": "f"}]}, "functions"), ({"best_of": 3}, "best_of"), ({"audio": {"voice": "x"}}, "audio"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"), ({"use_beam_search": True}, "use_beam_search"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["audio"]}, "modalities.0"), ({"n": 0}, "n"), ({"n": 1000}, "n"), ({"temperature": -1}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"), ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": 10**30}, "max_tokens"), ({"top_p": 1.1}, "top_p"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"seed": 1 << 70}, "seed"), ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"), ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"stop_token_ids": [5000]}, "stop_token_ids"), ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"priority": -1}, "priority"), ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}}, "response_format"),
    ({"guided_regex": "a", "grammar": "b"}, "grammar"), ({"guided_choice": []}, "guided_choice"), ({"structured_outputs": {"tag": 1}}, "structured_outputs.tag"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_by_name(body, param):
    error = refusal(body)
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["message"]


@pytest.mark.parametrize("body", [
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "x", "verbosity": "low"},
    {"functions": None, "best_of": 1, "logit_bias": {}, "tools": None, "stop": None, "seed": None, "n": None, "stream": None},
    {"best_of": 2, "n": 2}, {"tools": [], "tool_choice": "none"}, {"no_such_field": {"deep": [1]}},
])  # fmt: skip
def test_hints_and_fields_that_ask_for_nothing_are_let_through(body):
    assert sent(body)


def test_a_tokenizer_without_a_template_is_named():
    bare = AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)
    bare.chat_template = None
    error = ask(service(served(tokenizer_=bare)), PATH, {"messages": HELLO}).json()["error"]
    assert "no chat template" in error["message"] and "/v1/completions" in error["message"]


def test_what_the_template_refuses_is_told():
    strict = AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)
    strict.chat_template = "{{ raise_exception('users come first') }}"
    response = ask(service(served(tokenizer_=strict)), PATH, {"messages": HELLO})
    assert response.status_code == 400 and "users come first" in response.json()["error"]["message"]


# ---- when the engine does not ------------------------------------------------------------------------------


def test_a_full_queue_is_429_and_says_when_to_come_again():
    response = ask(service(max_waiting=0), PATH, {"messages": HELLO})
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_an_engine_that_closes_is_503():
    one = service()
    one.served.engine.drain(1)
    response = ask(one, PATH, {"messages": HELLO})
    assert response.status_code == 503 and "retry-after" in response.headers


def test_an_engine_that_fails_is_an_error_and_in_a_stream_an_event():
    response = ask(service(fails_at=2), PATH, {"messages": HELLO})
    assert response.status_code == 500 and "told to fail" in response.json()["error"]["message"]
    found = events(ask(service(fails_at=2), PATH, {"messages": HELLO, "stream": True}))
    assert found[-1] is None and found[-2]["error"]["type"] == "api_error"


def test_time_is_limited():
    limits = Limits(request_seconds=0.1)
    says = saying(TEXT * 20)
    response = ask(service(says=says, step_seconds=0.02, limits=limits), PATH, {"messages": HELLO})
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    one = service(says=says, step_seconds=0.02, limits=limits)
    found = events(ask(one, PATH, {"messages": HELLO, "stream": True}))
    assert found[-1] is None and found[-2]["error"]["code"] == "timeout" and len(found) > 3
    assert one.served.engine.tickets[0].cancelled


def test_a_long_prompt_is_made_tokens_of_in_a_thread_of_its_own():
    long = [{"role": "user", "content": "word " * 10_000}]
    assert len(sent({"messages": long}, context=1 << 20).ids) == len(prompt_of(long))
