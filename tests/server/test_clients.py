"""OpenAI's and Anthropic's own clients against a server on a socket."""

import json

import pytest

from tests.server.support import HELLO, TEXT, ids, listening, service
from tests.server.test_responses import scripted  # noqa: F401  (a fixture)

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}


@pytest.fixture(scope="module")
def url():
    with listening(service(cached=3)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


# ---- openai-python -----------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat(client):
    found = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=1, seed=1, temperature=0)
    assert found.choices[0].message.content == TEXT and found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens_details.cached_tokens == 3 and found.choices[0].logprobs.content[0].logprob == -0.5
    assert found._request_id.startswith("req_")


def test_chat_stream(client):
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage.completion_tokens == len(ids(TEXT)) + 1 and chunks[-1].kt["cached_tokens"] == 3


def test_chat_stream_helper(client):
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        assert any(event.type == "content.delta" for event in stream)
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_tools(client, scripted):  # noqa: F811
    found = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL]).choices[0]
    assert found.finish_reason == "tool_calls" and found.message.content == "one" and found.message.reasoning_content == "thinking"
    assert [(call.id, call.function.name, call.function.arguments) for call in found.message.tool_calls] == [
        ("call_1", "look", '{"a":1}'), ("call_2", "look", "{}")]  # fmt: skip
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[TOOL]) as stream:
        calls = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(call.name, call.arguments) for call in calls] == [("look", '{"a":1}'), ("look", "{}")]


def test_completions(client):
    found = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, echo=True, logprobs=2)
    assert [choice.text[0] for choice in found.choices] == ["a", "b"] and len(found.choices[0].logprobs.tokens) == 4
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_responses(client):
    assert client.responses.create(model="tiny", input="Where?").output_text == TEXT
    with client.responses.stream(model="tiny", input="Where?") as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == TEXT
        assert stream.get_final_response().output_text == TEXT


def test_responses_with_tools(client, scripted):  # noqa: F811
    tool = {"type": "function", **TOOL["function"]}
    with client.responses.stream(model="tiny", input="Where?", tools=[tool]) as stream:
        list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[2].arguments == '{"a":1}' and final.output[0].content[0].text == "thinking"


@pytest.mark.parametrize(("call", "error"), [
    (lambda c: c.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError),
    (lambda c: c.embeddings.create(model="tiny", input="a"), openai.NotFoundError),
    (lambda c: c.models.retrieve("other"), openai.NotFoundError),
    (lambda c: c.completions.create(model="tiny", prompt="a", suffix="b"), openai.BadRequestError),
])  # fmt: skip
def test_errors_are_the_clients_own(client, call, error):
    with pytest.raises(error) as raised:
        call(client)
    assert raised.value.body["message"] and raised.value.request_id


def test_a_failure_in_a_stream_is_an_error():
    with listening(service(fails_at=2)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="told to fail"):
            list(stream)


# ---- anthropic-python --------------------------------------------------------------------------------------


def test_messages(claude):
    found = claude.messages.create(model="tiny", max_tokens=100, messages=HELLO, system="Be brief.")
    assert found.content[0].text == TEXT and found.stop_reason == "end_turn" and found.usage.cache_read_input_tokens == 3
    assert found._request_id.startswith("req_")


def test_messages_stream(claude):
    with claude.messages.stream(model="tiny", max_tokens=100, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert final.usage.output_tokens == len(ids(TEXT)) + 1 and final.stop_reason == "end_turn"


def test_messages_with_tools(claude, scripted):  # noqa: F811
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    with claude.messages.stream(model="tiny", max_tokens=100, messages=HELLO, tools=tools) as stream:
        list(stream)
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert final.content[2].input == {"a": 1} and final.stop_reason == "tool_use"
    assert json.dumps(claude.messages.create(model="t", max_tokens=9, messages=HELLO, tools=tools).content[2].input) == '{"a": 1}'


def test_counting(claude):
    assert claude.messages.count_tokens(model="tiny", messages=HELLO).input_tokens > 3


def test_errors_are_anthropics_own(claude):
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model="tiny", max_tokens=5, messages=[])
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    with listening(service(max_waiting=0)) as url, anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model="tiny", max_tokens=5, messages=HELLO)
