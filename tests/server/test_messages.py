"""Anthropic's /v1/messages: blocks in, blocks out, and errors in that API's shape."""

import pytest

from ktransformers.server.messages_input import CountRequest, chat_of
from tests.server.support import HELLO, TEXT, ask, events, ids, service, tokenizer
from tests.server.test_responses import scripted  # noqa: F401  (a fixture)

PATH = "/v1/messages"
BODY = {"model": "tiny", "max_tokens": 100, "messages": HELLO}
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}


def test_an_answer_is_a_message_of_blocks():
    found = ask(service(cached=4), PATH, BODY | {"system": "Be brief."}).json()
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "tiny")
    assert found["content"] == [{"type": "text", "text": TEXT}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    prompt = len(tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert found["usage"]["input_tokens"] == prompt - 4 and found["usage"]["cache_read_input_tokens"] == 4
    assert found["usage"]["output_tokens"] == len(ids(TEXT)) + 1


def test_events_open_fill_and_close_a_block():
    found = events(ask(service(), PATH, BODY | {"stream": True}))
    names = [event["type"] for event in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta") == TEXT
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == len(ids(TEXT)) + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "reason", "stop"), [
    ({"max_tokens": 2}, "max_tokens", None), ({"stop_sequences": ["zzz", "experts"]}, "stop_sequence", "experts"),
])  # fmt: skip
def test_it_says_why_it_stopped(body, reason, stop, stream):
    response = ask(service(), PATH, BODY | body | {"stream": stream})
    found = events(response)[-2]["delta"] if stream else response.json()
    assert (found["stop_reason"], found["stop_sequence"]) == (reason, stop)


def test_thinking_and_uses_of_tools_are_blocks(scripted):  # noqa: F811
    whole = ask(service(), PATH, BODY | {"tools": [TOOL]}).json()
    assert whole["stop_reason"] == "tool_use"
    assert whole["content"] == [
        {"type": "thinking", "thinking": "thinking", "signature": ""}, {"type": "text", "text": "one"},
        {"type": "tool_use", "id": "call_1", "name": "look", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "look", "input": {}},
    ]  # fmt: skip
    found = events(ask(service(), PATH, BODY | {"tools": [TOOL], "stream": True}))
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [(event["index"], event["content_block"]["type"]) for event in starts] == list(enumerate(["thinking", "text", "tool_use", "tool_use"]))
    parts = [event["delta"]["partial_json"] for event in found if event.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(parts) == '{"a":1}{}' and found[-2]["delta"]["stop_reason"] == "tool_use"
    assert [event["index"] for event in found if event["type"] == "content_block_stop"] == [0, 1, 2, 3]


def test_blocks_are_the_messages_of_a_chat():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "I look."},
                                          {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "here"}]},
                                     {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    chat = chat_of(CountRequest(messages=messages, tools=[TOOL], system=[{"type": "text", "text": "S"}],
                                tool_choice={"type": "any", "disable_parallel_tool_use": True}))  # fmt: skip
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "tool", "user"]
    assert chat.messages[2].tool_calls[0]["function"] == {"name": "look", "arguments": '{"a": 1}'}
    assert chat.messages[2].reasoning_content == "hm" and chat.messages[3].content == "here"
    assert chat.tool_choice == "required" and chat.parallel_tool_calls is False
    assert chat.tools[0].function.parameters == TOOL["input_schema"]


def test_a_last_message_of_the_assistant_is_gone_on_with():
    one = service()
    ask(one, PATH, BODY | {"messages": [*HELLO, {"role": "assistant", "content": "Experts are"}]})
    assert tokenizer().decode(one.served.engine.requests[0].ids).endswith("<|assistant|>Experts are")


def test_tokens_are_counted_without_an_answer():
    one = service()
    found = ask(one, PATH + "/count_tokens", {"model": "x", "messages": HELLO}).json()
    assert found == {"input_tokens": len(tokenizer().apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False))}
    assert one.served.engine.requests == []


@pytest.mark.parametrize(("body", "word"), [
    ({"max_tokens": None}, "max_tokens"), ({"messages": []}, "messages"), ({"system": [{"type": "image"}]}, "system"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"), ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "type"), ({"temperature": "hot"}, "temperature"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]}, "messages.content"),
    ({"tool_choice": {"type": "tool", "name": "no"}, "tools": [TOOL]}, "tool_choice"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_in_anthropics_shape(body, word):
    response = ask(service(), PATH, BODY | body)
    found = response.json()
    assert response.status_code == 400 and found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    assert word in found["error"]["message"] and found["request_id"] == response.headers["request-id"]


def test_other_errors_have_that_shape_too():
    full = ask(service(max_waiting=0), PATH, BODY)
    assert full.status_code == 429 and full.json()["error"]["type"] == "rate_limit_error"
    assert ask(service(), PATH, method="PUT").json()["error"]["type"] == "invalid_request_error"
    failed = events(ask(service(fails_at=1), PATH, BODY | {"stream": True}))[-1]
    assert failed["type"] == "error" and failed["error"]["type"] == "api_error"
