"""/v1/completions: texts and token ids, one or many, with what lm-eval reads of log-probabilities."""

import pytest

from ktransformers.server.service import Limits
from tests.server.support import TEXT, ask, events, ids, saying, service, tokenizer

PATH = "/v1/completions"
PROMPT = "Experts run on the CPU"


def test_an_answer_goes_on_from_the_prompt():
    one = service(cached=3)
    found = ask(one, PATH, {"prompt": PROMPT, "max_tokens": 4}).json()
    choice = found["choices"][0]
    assert choice == {"index": 0, "text": tokenizer().decode(ids(TEXT)[:4]), "logprobs": None, "finish_reason": "length"}
    assert found["object"] == "text_completion" and found["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert list(one.served.engine.requests[0].ids) == tokenizer().encode(PROMPT)


def test_without_max_tokens_there_are_sixteen_as_with_openai():
    assert ask(service(), PATH, {"prompt": PROMPT}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], ids(PROMPT), [ids(PROMPT)]], ids=["text", "texts", "ids", "lists"])
def test_a_prompt_is_a_text_or_token_ids(prompt):
    one = service()
    assert ask(one, PATH, {"prompt": prompt}).status_code == 200
    assert [list(request.ids) for request in one.served.engine.requests] == [ids(PROMPT)]


def test_many_prompts_times_many_answers_are_in_order():
    one = service(says=lambda request, answer: ids(f"{len(request.ids)} {answer}"))
    prompts = ["a", "a b c d", "a b"]
    found = ask(one, PATH, {"prompt": prompts, "n": 2, "echo": True}).json()
    wanted = [f"{prompt}{len(ids(prompt))} {answer}" for prompt in prompts for answer in range(2)]
    assert [choice["text"] for choice in found["choices"]] == wanted
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert found["usage"]["prompt_tokens"] == sum(len(ids(prompt)) for prompt in prompts)
    texts = [""] * 6
    for chunk in events(ask(one, PATH, {"prompt": prompts, "n": 2, "echo": True, "stream": True}))[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == wanted


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("tokens", [False, True])
def test_what_lm_eval_asks_for_has_a_logprob_for_each_token_of_the_prompt(limit, tokens):
    """It sends echo, logprobs=1 and 0 or 1 new tokens, as text or ids, and reads these two lists by position."""
    one = service()
    body = {"prompt": ids(PROMPT) if tokens else PROMPT, "echo": True, "logprobs": 1, "max_tokens": limit, "temperature": 0}
    choice = ask(one, PATH, body).json()["choices"][0]
    said = ids(PROMPT) + ids(TEXT)[:limit]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [None] + [-0.5] * (len(said) - 1)
    assert found["top_logprobs"][0] is None and all(max(top.values()) == -0.5 for top in found["top_logprobs"][1:])
    assert "".join(found["tokens"]) == choice["text"] == tokenizer().decode(said)
    assert [choice["text"][at:][: len(text)] for at, text in zip(found["text_offset"], found["tokens"], strict=True)] == found["tokens"]
    assert one.served.engine.requests[0].prompt_logprobs == 1


def test_one_new_token_follows_a_scored_prompt_even_where_the_answer_would_end():
    one = service(says=saying(""))
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
    assert ask(one, PATH, body).status_code == 200 and not one.served.engine.requests[0].sampling.stop_ids


def test_streams_have_the_same_logprobs():
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 12}
    whole = ask(service(), PATH, body).json()["choices"][0]
    joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for chunk in events(ask(service(), PATH, body | {"stream": True}))[:-1]:
        choice = chunk["choices"][0]
        text += choice["text"]
        for name in joined:
            joined[name] += choice["logprobs"][name]
    assert joined == whole["logprobs"] and text == whole["text"]


def test_no_logprobs_of_the_prompt_are_computed_without_echo():
    one = service()
    found = ask(one, PATH, {"prompt": PROMPT, "logprobs": 0, "max_tokens": 2}).json()["choices"][0]["logprobs"]
    assert len(found["tokens"]) == 2 and one.served.engine.requests[0].prompt_logprobs is None
    assert list(found["top_logprobs"][0].values()) == [-0.5], "the chosen token is always there"


def test_usage_of_a_stream():
    found = events(ask(service(), PATH, {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}))
    assert found[-2]["usage"]["completion_tokens"] == 16 and found[-2]["kt"]["tokens_per_second"] > 0


REFUSED = [
    ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"), ({"logprobs": 21}, "logprobs"), ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, None), ({"prompt": [1 << 40]}, None), ({"prompt": [1536]}, "prompt"),
    ({"prompt": [["a"]]}, None), ({"prompt": [1, "a"]}, None), ({"prompt": None}, None), ({"prompt": {}}, None),
    ({"prompt": ["a"] * 200}, "prompt"), ({"prompt": ["a"] * 10, "n": 100}, "prompt"), ({"prompt": [1.5]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_done_is_refused_by_name(body, param):
    response = ask(service(), PATH, {"prompt": PROMPT} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param or param is None and error["param"].startswith("prompt")


def test_when_one_of_many_is_not_taken_none_is():
    one = service(max_waiting=2, max_running=1, says=saying(TEXT * 20), step_seconds=0.02)
    response = ask(one, PATH, {"prompt": ["a"] * 8, "max_tokens": 500})
    assert response.status_code == 429
    assert all(ticket.cancelled for ticket in one.served.engine.tickets) and one.served.engine.tickets


def test_a_prompt_that_is_longer_than_the_context_is_refused():
    body = {"prompt": [5] * 101, "max_tokens": 1}
    assert ask(service(context=100), PATH, body).json()["error"]["code"] == "context_length_exceeded"
    assert ask(service(context=101), PATH, body | {"max_tokens": 0}).status_code == 200


def test_a_million_tokens_are_refused_in_no_time():
    response = ask(service(limits=Limits()), PATH, {"prompt": "word " * 1_000_000})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
