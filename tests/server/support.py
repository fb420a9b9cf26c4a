"""A server for tests: the embedded model's tokenizer, the fake engine, and two ways to speak to it."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from functools import cache

import httpx
from ktransformers.models import embedded_model
from transformers import AutoTokenizer

from ktransformers.server.app import create_app
from ktransformers.server.keys import Keys
from ktransformers.server.page_files import Page
from ktransformers.server.service import Limits, Served, Service, Settings
from ktransformers.server.serving import Server, bind, url_of
from tests.server.fake_engine import FakeEngine

VOCABULARY = 1536
TEXT = "Rules say where experts are. Ünïcödé 🙂 and more."
HELLO = [{"role": "user", "content": "Where are experts?"}]


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)


def ids(text):
    return tokenizer().encode(text, add_special_tokens=False)


def saying(*texts):
    """Answer i of a request is text i, the last one for all that follow."""
    said = [ids(text) for text in texts]
    return lambda request, answer: said[min(answer, len(said) - 1)]


def served(engine=None, tokenizer_=None, **engine_options):
    engine = engine or FakeEngine(engine_options.pop("says", saying(TEXT)), **engine_options)
    return Served(engine, tokenizer_ or tokenizer(), VOCABULARY, facts={"rule": "a rule"})


def service(served_=None, keys=None, settings=None, limits=None, **engine_options):
    """A service with a fake engine, whose options are the rest."""
    settings = settings or Settings(names=("tiny", "alias"), limits=limits or Limits())
    return Service(settings, served_ or served(**engine_options), keys or Keys())


def ask(service_, path, body=None, *, method=None, page=None, **given):
    """One request to the application, without a socket."""
    given |= {} if body is None else {"json": body}
    return ask_all(service_, [(method or ("GET" if body is None and "content" not in given else "POST"), path, given)], page)[0]


def ask_all(service_, requests, page=None):
    """Several requests, (method, path, what httpx takes), one after the other."""

    async def run():
        transport = httpx.ASGITransport(create_app(service_, page or Page()), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(method, path, **given) for method, path, given in requests]

    return asyncio.run(run())


def events(response):
    """The data of server-sent events; [DONE] as None."""
    blocks = [block for block in response.text.split("\n\n") if block.strip() and not block.startswith(":")]
    datas = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    return [None if data == "[DONE]" else json.loads(data) for data in datas]


@contextlib.contextmanager
def listening(service_, drain_seconds=5.0) -> Iterator[str]:
    """The service behind a socket of its own; the value is its URL."""
    bound = bind("127.0.0.1", 0)
    url = url_of(bound)
    server = Server(service_, bound, drain_seconds)
    made = service_.served
    thread = threading.Thread(target=server.answer, args=(lambda: made,), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, seconds=10.0):
    """Until it is true; fails after some time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
