"""What only shows on sockets: clients that go or do not read, a thousand at once, and how a server ends."""

import asyncio
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from ktransformers.errors import KTransformersError
from ktransformers.server.keys import Keys
from ktransformers.server.service import Limits, Service
from ktransformers.server.serving import Server, bind, url_of
from tests.server.support import HELLO, TEXT, events, listening, saying, service, wait_for

CHAT = "/v1/chat/completions"
LONG = saying((TEXT + " ") * 35)


def raw(url):
    """A bare connection."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def request_bytes(body, path=CHAT):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


# ---- clients that go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}], ids=str)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_when_a_client_goes_its_answer_ends(body, path):
    one = service(says=LONG, step_seconds=0.01)
    with listening(one) as url:
        with raw(url) as connection:
            connection.sendall(request_bytes(body | ({"messages": HELLO} if path == CHAT else {"prompt": "a", "max_tokens": 900}), path))
            wait_for(lambda: one.served.engine.tickets and one.served.engine.tickets[0].sent[0] > 3)
        wait_for(lambda: one.served.engine.tickets[0].over, 1.0)
    assert one.served.engine.tickets[0].cancelled and max(one.served.engine.tickets[0].sent) < 150


def test_when_a_client_goes_before_its_turn_it_is_forgotten():
    one = service(says=LONG, step_seconds=0.01, max_running=1)
    with listening(one) as url, raw(url) as first:
        first.sendall(request_bytes({"messages": HELLO, "stream": True}))
        wait_for(lambda: one.served.engine.load().running)
        with raw(url) as second:
            second.sendall(request_bytes({"messages": HELLO, "stream": True}))
            wait_for(lambda: one.served.engine.load().waiting)
        wait_for(lambda: one.served.engine.tickets[1].cancelled, 1.0)
        assert not one.served.engine.tickets[0].cancelled


# ---- clients that do not read ------------------------------------------------------------------------------


def test_a_slow_reader_holds_nobody_up_and_is_cut_off_in_the_end():
    """Its answer has ten thousand events of 200 bytes, of which sockets take a part; it reads none."""
    slow = service(says=lambda request, answer: LONG(request, answer) * 60, limits=Limits(unread_events=2000), context=100_000)
    with listening(slow) as url, raw(url) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(request_bytes({"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}))
        wait_for(lambda: slow.served.engine.tickets)
        other = httpx.post(url + CHAT, json={"messages": HELLO, "max_tokens": 20}, timeout=20)
        assert other.status_code == 200
        wait_for(lambda: slow.served.engine.tickets[0].cancelled, 20)
        assert "behind" in httpx.get(url + "/metrics").text


def test_a_reader_that_pauses_misses_nothing():
    paused = service(says=LONG)
    with listening(paused) as url, httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}, timeout=20) as response:
        time.sleep(0.3)  # the engine has long ended
        response.read()
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response)[:-1])
    assert text == (TEXT + " ") * 35


def test_a_body_that_does_not_come_is_given_up():
    with listening(service(limits=Limits(body_seconds=0.2))) as url, raw(url) as slow:
        slow.sendall(request_bytes({"messages": HELLO})[:-5])
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


# ---- many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("waiting", "seconds", "wanted"), [(2000, 0, {200}), (100, 0.02, {200, 429})])
def test_a_thousand_at_once_are_answered_or_told_to_come_again(waiting, seconds, wanted):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    busy = service(says=saying("Rules say where."), max_waiting=waiting, max_running=64, step_seconds=seconds)
    with listening(busy) as url:
        found = asyncio.run(_all_at_once(url, 1000))
    assert {status for status, _ in found} == wanted
    for status, text in found:
        assert text.endswith("data: [DONE]\n\n") if status == 200 else json.loads(text)["error"]["code"] == "queue_full"
    assert sum(status == 200 for status, _ in found) >= min(1000, waiting)


async def _all_at_once(url, count):
    parts, data = urlsplit(url), request_bytes({"messages": HELLO, "stream": True})
    together = asyncio.Event()

    async def one():
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        await together.wait()
        writer.write(data.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read()
        writer.close()
        return int(head.split()[1]), _joined(body) if b"chunked" in head.lower() else body.decode()

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await asyncio.sleep(0.5)
    together.set()
    return await asyncio.gather(*tasks)


def _joined(body):
    text = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        text, body = text + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return text.decode()


# ---- requests that are two ---------------------------------------------------------------------------------

SMUGGLED = [
    b"content-length: 5\r\ntransfer-encoding: chunked", b"content-length: 5\r\ncontent-length: 6",
    b"transfer-encoding: chunked, identity", b"content-length : 5", b"content-length: 5\n x: y", b"x: a\x00b", b"content-length: +5",
    b"transfer-encoding: xchunked", b" folded: 5",
]  # fmt: skip


@pytest.mark.parametrize("header", SMUGGLED, ids=repr)
def test_a_request_cannot_hide_another(header):
    """Where two readers could disagree on where a request ends, it is refused or read as one, and never as two."""
    one = service(keys=Keys(None, "sesame"))
    inner = b"0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\nx-request-id: inner\r\n\r\n"
    with listening(one) as url, raw(url) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\n" + header + b"\r\n\r\n" + inner)
        connection.settimeout(1.0)
        answer = b""
        try:
            while more := connection.recv(4096):
                answer += more
        except TimeoutError:
            pass
    first = int(answer.split()[1])
    assert first in (400, 401, 413) and (b"inner" not in answer or header.startswith(b"x"))


def test_the_key_of_one_request_is_not_the_next_ones():
    with listening(service(keys=Keys(None, "sesame"))) as url:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        for headers, status in (({"authorization": "Bearer sesame"}, 200), ({}, 401), ({"authorization": "Bearer sesame"}, 200)):
            connection.connect()
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == status


# ---- the end -----------------------------------------------------------------------------------------------


def test_an_answer_that_was_begun_is_ended_and_nobody_else_is_let_in():
    one = service(says=LONG, step_seconds=0.002)
    bound = bind("127.0.0.1", 0)
    url, server, made = url_of(bound), Server(one, bound, 10.0), one.served
    thread = threading.Thread(target=server.answer, args=(lambda: made,))
    thread.start()
    wait_for(lambda: server.started)
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}, timeout=20) as response:
        server.should_exit = True
        wait_for(lambda: made.engine._closing)
        response.read()
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in events(response)[:-1]) == (TEXT + " ") * 35
    thread.join(10)
    assert not thread.is_alive() and not made.engine._thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_an_answer_that_takes_too_long_to_end_is_told_so():
    one = service(says=LONG, step_seconds=0.05)
    with listening(one, drain_seconds=0.3) as url:
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}, timeout=20) as response:
            wait_for(lambda: one.served.engine.tickets)
            threading.Timer(0.1, lambda: one.served.engine.drain(0.3) or one.served.engine.close()).start()
            response.read()
    assert events(response)[-2]["error"]["type"] == "overloaded_error"


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def broken():
        raise KTransformersError("no such model")

    server = Server(Service(), bind("127.0.0.1", 0))
    with pytest.raises(KTransformersError, match="no such model"):
        server.answer(broken)


def test_an_address_that_is_taken_is_one_error():
    with bind("127.0.0.1", 0) as bound:
        with pytest.raises(KTransformersError, match="--port"):
            bind("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(KTransformersError, match="--host"):
        bind("no such host.", 80)


PROGRAM = """
import sys, time
from tests.server.support import *
from ktransformers.server.serving import Server, bind, url_of
keys = Keys(sys.argv[1])
one = service(keys=keys, says=saying(TEXT * 4), step_seconds=0.01)
made, one.served = one.served, None
bound = bind("127.0.0.1", 0)
print(url_of(bound), flush=True)
def load():
    time.sleep(0.5)
    return made
Server(one, bound, 10.0).answer(load)
print("ended", flush=True)
"""


def test_signals(tmp_path):
    """503 while loading; SIGHUP reads keys again; SIGTERM lets an answer end, and exits with 0."""
    keys, root = tmp_path / "keys", Path(__file__).parents[2]
    keys.write_text("one")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, keys], stdout=subprocess.PIPE, text=True, cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    try:
        url = process.stdout.readline().strip()
        assert httpx.get(url + "/health").status_code == 503
        wait_for(lambda: httpx.get(url + "/health").status_code == 200)
        keys.write_text("two")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: httpx.get(url + "/v1/models", headers={"x-api-key": "two"}).status_code == 200)
        assert httpx.get(url + "/v1/models", headers={"x-api-key": "one"}).status_code == 401
        headers = {"x-api-key": "two"}
        with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}, headers=headers, timeout=20) as response:
            process.send_signal(signal.SIGTERM)
            response.read()
        assert events(response)[-1] is None and events(response)[-2]["choices"][0]["finish_reason"] == "stop"
        assert process.wait(10) == 0 and process.stdout.read() == "ended\n"
    finally:
        process.kill()
