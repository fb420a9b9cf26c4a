"""/v1/responses: items in, items out, and the events that fill them."""

import pytest

from ktransformers.server import answers
from ktransformers.server.answers import Content, Reasoning, ToolCall
from tests.server.support import TEXT, ask, events, ids, service, tokenizer

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


class Scripted:
    """A reader that makes these of an answer, whatever it says."""

    keep, over = frozenset(), False
    pieces = (Reasoning("think"), Reasoning("ing"), Content("one"), ToolCall(0, "call_1", "look", ""),
              ToolCall(0, "call_1", None, '{"a":'), ToolCall(0, "call_1", None, "1}"), ToolCall(1, "call_2", "look", "{}"))  # fmt: skip

    def __init__(self, *_):
        self._left = list(self.pieces)

    def add(self, text):
        return [self._left.pop(0)] if self._left else []

    def end(self):
        return self._left


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(answers, "reader", Scripted)


def prompt_of(messages):
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_an_answer_is_a_message_of_text():
    found = ask(service(cached=2), PATH, {"input": "Where?", "instructions": "Be brief."}).json()
    assert found["object"] == "response" and found["status"] == "completed" and found["error"] is None
    item = found["output"][0]
    assert item["type"] == "message" and item["status"] == "completed"
    assert item["content"] == [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}]
    assert found["usage"]["input_tokens_details"] == {"cached_tokens": 2}
    assert found["usage"]["output_tokens"] == len(ids(TEXT)) + 1


def test_events_tell_what_the_answer_in_one_has():
    found = events(ask(service(), PATH, {"input": "Where?", "stream": True}))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    names = [event["type"].removeprefix("response.") for event in found]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta") == TEXT
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == TEXT
    assert found[2]["item"]["content"] == [] and found[2]["item"]["status"] == "in_progress"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_off_is_incomplete(stream):
    response = ask(service(), PATH, {"input": "Where?", "max_output_tokens": 2, "stream": stream})
    found = events(response)[-1]["response"] if stream else response.json()
    assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.usefixtures("scripted")
def test_reasoning_and_calls_are_items_of_their_own():
    whole = ask(service(), PATH, {"input": "Where?", "tools": [TOOL]}).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "thinking"}]
    calls = [(item["call_id"], item["name"], item["arguments"]) for item in whole["output"][2:]]
    assert calls == [("call_1", "look", '{"a":1}'), ("call_2", "look", "{}")]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    found = events(ask(service(), PATH, {"input": "Where?", "tools": [TOOL], "stream": True}))
    streamed = found[-1]["response"]["output"]
    strip = lambda items: [{k: v for k, v in item.items() if k != "id"} for item in items]  # noqa: E731
    assert strip(streamed) == strip(whole["output"])
    arguments = "".join(event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta")
    assert arguments == '{"a":1}{}'
    opened = [event["item"]["id"] for event in found if event["type"] == "response.output_item.added"]
    assert opened == [item["id"] for item in streamed] == [e["item"]["id"] for e in found if e["type"] == "response.output_item.done"]


def test_items_are_the_messages_of_a_chat():
    one = service()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Where?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "There."}]},
        {"role": "user", "content": "Why?"},
    ]
    assert ask(one, PATH, {"input": items, "instructions": "Be brief."}).status_code == 200
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "There."}, {"role": "user", "content": "Why?"}]  # fmt: skip
    assert list(one.served.engine.requests[0].ids) == prompt_of(messages)


def test_calls_and_their_results_stay_together():
    from ktransformers.server.responses_input import ResponsesRequest, chat_of

    items = [
        {"role": "user", "content": "Where?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "here"},
    ]
    chat = chat_of(ResponsesRequest(input=items, tools=[TOOL], tool_choice={"type": "function", "name": "look"}))
    assert [message.role for message in chat.messages] == ["user", "assistant", "tool"]
    own = chat.messages[1]
    assert own.reasoning_content == "hm" and own.content == "I look." and [call["id"] for call in own.tool_calls] == ["c1", "c2"]
    assert chat.messages[2].tool_call_id == "c1" and chat.tool_choice.function.name == "look"


@pytest.mark.parametrize(("body", "word"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"), ({"tools": [{"type": "web_search"}]}, "web_search"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"), ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
    ({"input": [{"role": 5, "content": "x"}]}, "role"), ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "function"}]}, "name"), ({"input": [{"type": ["message"]}]}, "items"),
    ({"tool_choice": {"type": "function", "name": "no"}, "tools": [TOOL]}, "tool_choice"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(body, word):
    response = ask(service(), PATH, {"input": "hi"} | body)
    assert response.status_code == 400 and word in response.json()["error"]["message"]


def test_a_failure_is_an_event():
    found = events(ask(service(fails_at=1), PATH, {"input": "hi", "stream": True}))
    assert found[-1]["type"] == "response.failed" and "told to fail" in found[-1]["response"]["error"]["message"]
