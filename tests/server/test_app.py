"""What is the same for all endpoints: errors, keys, ids, limits, CORS, logs; and the endpoints that tell of the server."""

import json
import logging

import pytest

from ktransformers.server import chat
from ktransformers.server.keys import Keys
from ktransformers.server.page_files import Page
from ktransformers.server.service import Limits, Service, Settings
from tests.server.support import HELLO, TEXT, ask, ask_all, ids, served, service, tokenizer

CHAT, BODY = "/v1/chat/completions", {"messages": HELLO}


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nope", 404), ("POST", "/v1/nope", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405), ("GET", "/v1/chat/completions/", 404),
    ("POST", "/v1/embeddings", 404), ("GET", "/..%2f..%2fetc/passwd", 404), ("GET", "//etc/passwd", 404), ("GET", "/%00", 404),
    ("POST", "/v1/images/generations", 404), ("OPTIONS", CHAT, 405),
])  # fmt: skip
def test_every_wrong_address_is_an_error_object(method, path, status):
    error_of(ask(service(), path, method=method), status)


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xff", b'"text"', b"[]", b"null", b'{"messages": NaN}', b"[" * 50_000, b'{"messages": 1e999}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"5" * 6000, b'{"a": 1}{"b": 2}',
], ids=repr)  # fmt: skip
def test_a_body_that_is_no_request_is_one_error(content):
    response = ask(service(), CHAT, content=content, headers={"content-type": "application/json"})
    error_of(response, 400)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_json_says_that_it_is_json(kind):
    """So that no page of another site can send it without asking the browser's leave."""
    headers = {"content-type": kind} if kind else {}
    error = error_of(ask(service(), CHAT, content=json.dumps(BODY).encode(), headers=headers), 400)
    assert "Content-Type: application/json" in error["message"]


def test_what_nobody_expected_is_an_error_object_and_no_prompt_is_in_the_log(monkeypatch, caplog):
    prompt = "".join(("ses", "ame"))

    def broken(*_):
        raise ZeroDivisionError(prompt)

    monkeypatch.setattr(chat, "run_of", broken)
    with caplog.at_level(logging.INFO, "ktransformers.server"):
        error = error_of(ask(service(), CHAT, BODY), 500)
    assert "sesame" not in error["message"] + caplog.text and "ZeroDivisionError" in caplog.text


# ---- limits ------------------------------------------------------------------------------------------------


def test_a_body_is_bounded_whether_it_says_its_size_or_not():
    small = service(limits=Limits(body_bytes=1000))

    async def pieces():
        for _ in range(100):
            yield b" " * 100

    for content in (b" " * 1001, pieces()):
        error = error_of(ask(small, CHAT, content=content, headers={"content-type": "application/json"}), 413)
        assert "1000 bytes" in error["message"]
    assert ask(small, CHAT, BODY).status_code == 200


@pytest.mark.parametrize("said", ["-1", "1e3", "abc", "9" * 100])
def test_a_size_that_is_no_number_is_refused(said):
    response = ask(service(), CHAT, content=b"{}", headers={"content-type": "application/json", "content-length": said})
    error_of(response, 413)


def test_all_bodies_together_are_bounded_and_given_back():
    tight = service(limits=Limits(all_bodies_bytes=100))
    big = BODY | {"user": "x" * 200}
    found = ask_all(tight, [("POST", CHAT, {"json": big})] * 3 + [("POST", CHAT, {"json": BODY})])
    assert [response.status_code for response in found] == [503, 503, 503, 200]


# ---- keys --------------------------------------------------------------------------------------------------

LOCKED = ["/v1/models", "/metrics", "/props", "/v1/models/tiny", "/openapi.json", "/nope"]


@pytest.mark.parametrize("path", LOCKED)
def test_nobody_is_let_in_without_a_key(path):
    locked = service(keys=Keys(None, "sesame"))
    for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "sesame"}, {"x-api-key": ""}, {"cookie": "sesame"}):
        error = error_of(ask(locked, path, headers=headers), 401)
        assert error["code"] == "invalid_api_key" and "sesame" not in error["message"]
    assert ask(locked, path, headers={"authorization": "Bearer sesame"}).status_code in (200, 404)
    assert ask(locked, path, headers={"x-api-key": "sesame"}).status_code in (200, 404)


def test_nothing_is_asked_of_the_engine_without_a_key():
    locked = service(keys=Keys(None, "sesame"))
    for path in (CHAT, "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize", "/%76%31/chat/completions", "//v1/chat/completions"):
        assert ask(locked, path, BODY).status_code == 401
    assert locked.served.engine.requests == []
    assert ask(locked, "/v1/messages", BODY).json()["error"]["type"] == "authentication_error"


def test_health_and_the_page_need_no_key(tmp_path):
    (tmp_path / "index.html").write_text("<p>page")
    (tmp_path / "page.js").write_text("1")
    locked, page = service(keys=Keys(None, "sesame")), Page(tmp_path)
    assert ask(locked, "/health").status_code == 200
    assert ask(locked, "/", page=page).text == "<p>page"
    assert ask(locked, "/page.js", page=page).headers["content-type"].startswith("text/javascript")
    assert ask(locked, "/other.js", page=page).status_code == 401


# ---- ids, CORS, logs ---------------------------------------------------------------------------------------


def test_a_request_has_an_id_its_own_where_that_is_harmless():
    assert ask(service(), "/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for bad in ("a b", "x" * 200, "a\tb", "ü"):
        response = ask(service(), "/health", headers={"x-request-id": bad.encode()})
        assert response.headers["x-request-id"].startswith("req_")
    assert ask(service(), "/nope").headers["x-request-id"]


def test_pages_from_elsewhere_may_ask_where_they_are_named():
    named = service(settings=Settings(cors=("https://a.example",)), keys=Keys(None, "sesame"))
    asked = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = ask(named, CHAT, method="OPTIONS", headers=asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://a.example"
    error = ask(named, CHAT, BODY, headers={"origin": "https://a.example"})
    assert error.status_code == 401 and error.headers["access-control-allow-origin"] == "https://a.example"
    other = ask(named, CHAT, method="OPTIONS", headers=asked | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in ask(service(), "/health", headers={"origin": "https://a.example"}).headers


def test_the_log_has_a_line_for_each_request_and_no_prompt(caplog):
    with caplog.at_level(logging.DEBUG):
        ask(service(keys=Keys(None, "sesame")), CHAT, BODY, headers={"authorization": "Bearer sesame"})
    line = next(record.getMessage() for record in caplog.records if record.name == "ktransformers.server")
    assert line.startswith(f"POST {CHAT} 200 ") and f"new={len(ids(TEXT)) + 1}" in line
    assert HELLO[0]["content"] not in caplog.text and "sesame" not in caplog.text and TEXT not in caplog.text


def test_the_log_has_prompts_where_that_is_asked_for(caplog):
    with caplog.at_level(logging.INFO):
        ask(service(settings=Settings(log_prompts=True)), CHAT, BODY)
    assert HELLO[0]["content"] in caplog.text


def test_no_address_makes_a_line_of_its_own_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        ask(service(), "/a%0aPOST%20/v1 200")
    assert all("\n" not in record.getMessage() for record in caplog.records if record.name == "ktransformers.server")


# ---- what it tells of itself -------------------------------------------------------------------------------


def test_while_the_model_is_loaded_it_says_so():
    loading = Service(Settings(names=("tiny",)))
    for path, body in (("/health", None), (CHAT, BODY), ("/v1/messages", BODY | {"max_tokens": 1}), ("/tokenize", {"prompt": "a"}), ("/props", None)):
        response = ask(loading, path, body)
        assert response.status_code == 503 and response.headers["retry-after"]
    assert ask(loading, "/v1/models").json()["data"][0]["id"] == "tiny" and ask(loading, "/metrics").status_code == 200
    loading.served = served()
    assert ask(loading, "/health").json() == {"status": "ok"}


def test_models_are_its_names():
    assert [one["id"] for one in ask(service(), "/v1/models").json()["data"]] == ["tiny", "alias"]
    assert ask(service(), "/v1/models/alias").json()["id"] == "alias"
    assert error_of(ask(service(), "/v1/models/other"), 404)["code"] == "model_not_found"


def test_any_name_will_do_unless_names_are_strict():
    assert ask(service(), CHAT, BODY | {"model": "other"}).json()["model"] == "tiny"
    strict = service(settings=Settings(names=("tiny", "a/b"), strict_names=True))
    assert error_of(ask(strict, CHAT, BODY | {"model": "other"}), 404)["code"] == "model_not_found"
    assert strict.served.engine.requests == []
    assert ask(strict, CHAT, BODY | {"model": "a/b"}).status_code == 200 and ask(strict, "/v1/models/a/b").status_code == 200


def test_figures_for_prometheus():
    one = service(cached=3)
    found = ask_all(one, [("POST", CHAT, {"json": BODY}), ("GET", "/nope", {}), ("GET", "/metrics", {})])[-1].text
    values = dict(line.rsplit(" ", 1) for line in found.splitlines() if not line.startswith("#"))
    assert float(values["kt_new_tokens_total"]) == len(ids(TEXT)) and float(values["kt_cached_tokens_total"]) == 3
    assert float(values["kt_time_to_first_token_seconds_count"]) == 1
    assert float(values["kt_inter_token_seconds_count"]) == len(ids(TEXT)) - 1
    assert float(values[f'kt_requests_total{{endpoint="{CHAT}",status="200"}}']) == 1
    assert float(values['kt_requests_total{endpoint="other",status="404"}']) == 1
    assert float(values["kt_cache_bytes"]) == 1000 and float(values["kt_cache_limit_bytes"]) == 2000
    for name in ("kt_running", "kt_waiting", "kt_steps_total", "kt_preemptions_total"):
        assert name in values


def test_props_tell_of_model_and_machine():
    found = ask(service(), "/props").json()
    assert found["context"] == 1024 and found["rule"] == "a rule" and found["chat_template"] is True


def test_texts_become_tokens_and_tokens_text():
    found = ask(service(), "/tokenize", {"prompt": TEXT}).json()
    assert found["tokens"] == tokenizer().encode(TEXT) and found["count"] == len(found["tokens"])
    assert ask(service(), "/detokenize", {"tokens": found["tokens"]}).json()["prompt"] == TEXT
    talk = ask(service(), "/tokenize", {"messages": HELLO}).json()["tokens"]
    assert talk == tokenizer().apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"prompt": 5}):
        error_of(ask(service(), "/tokenize", body), 400)
    for tokens in ([1536], [-1], ["a"], [1 << 70], 5):
        error_of(ask(service(), "/detokenize", {"tokens": tokens}), 400)


def test_the_description_of_the_interface_has_every_endpoint_and_field():
    found = ask(service(), "/openapi.json").json()
    assert {CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/health"} <= set(found["paths"])
    assert "temperature" in found["components"]["schemas"]["ChatRequest"]["properties"]
