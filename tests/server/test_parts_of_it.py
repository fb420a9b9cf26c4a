"""The small parts: JSON that is checked, keys, the text of single tokens, events between threads."""

import asyncio
import json
import threading
import time

import pytest

from ktransformers.engine.requests import Token
from ktransformers.errors import KTransformersError
from ktransformers.server import streaming
from ktransformers.server.encoding import DEPTH, dumps, loads
from ktransformers.server.inbox import Bell, Inbox
from ktransformers.server.keys import Keys
from ktransformers.server.run import Aborted, Usage
from ktransformers.server.streaming import EventStream
from ktransformers.server.vocabulary import Vocabulary
from tests.server.support import VOCABULARY, tokenizer

# ---- JSON --------------------------------------------------------------------------------------------------

BAD = [
    b"", b"{", b"[1,]", b"\xff\xfe", b'{"a": NaN}', b"[Infinity]", b"[-Infinity]", b"[1e999]", b'"\\ud800"',
    b'{"\\udc00": 1}', b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"1" * 5000, b"\xed\xa0\x80",
]  # fmt: skip


@pytest.mark.parametrize("body", BAD, ids=lambda body: repr(body[:20]))
def test_what_is_no_json_in_utf_8_is_refused(body):
    with pytest.raises(ValueError):
        loads(body)


def test_everything_else_is_read_as_json_reads_it():
    value = {"a": [1, -2.5, None, True, "ü🙂"], "b": {"c": [[[]]]}, "": 10**300}
    assert loads(json.dumps(value).encode()) == value == loads(dumps(value))
    assert loads(b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1)) is not None


# ---- keys --------------------------------------------------------------------------------------------------


def bearer(key):
    return {b"authorization": b"Bearer " + key}


def test_keys_are_those_of_the_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# mine\n\n  one  \ntwo\n")
    keys = Keys(file, "three, ,four")
    for key in (b"one", b"two", b"three", b"four"):
        assert keys.allow(bearer(key)) and keys.allow({b"x-api-key": key})
    for headers in ({}, bearer(b""), bearer(b"on"), bearer(b"# mine"), {b"authorization": b"Basic one"}, {b"x-api-key": b"\xff"}):
        assert not keys.allow(headers)


def test_without_keys_all_may_ask():
    assert Keys().allow({}) and not Keys().needed


def test_a_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one")
    keys = Keys(file)
    file.write_text("two")
    assert keys.reload() == 1 and keys.allow(bearer(b"two")) and not keys.allow(bearer(b"one"))
    for bad in (b"", b"# none\n", b"\xff"):
        file.write_bytes(bad)
        with pytest.raises(KTransformersError, match="--api-key-file"):
            keys.reload()
        assert keys.allow(bearer(b"two")) and not keys.allow({})
    file.unlink()
    with pytest.raises(KTransformersError):
        keys.reload()


def test_keys_are_not_in_what_python_shows_of_them(tmp_path):
    keys = Keys(None, "sesame")
    assert "sesame" not in repr(keys) and "sesame" not in repr(keys._digests)


# ---- the text of tokens ------------------------------------------------------------------------------------


def test_bytes_of_tokens_put_together_are_the_text():
    text, vocabulary = "Rules, naïve 🙂 日本語 \n\t x", Vocabulary(tokenizer())
    ids = tokenizer().encode(text)
    assert b"".join(map(vocabulary.bytes_of, ids)).decode() == text
    assert vocabulary.text_of(tokenizer().encode("🙂")[0]).startswith("bytes:\\xf0")


def test_every_token_has_a_text_and_special_ones_their_own():
    vocabulary = Vocabulary(tokenizer())
    assert all(isinstance(vocabulary.text_of(token), str) for token in range(VOCABULARY + 5))
    assert vocabulary.text_of(tokenizer().eos_token_id) == "<|end|>"


def test_pieces_of_sentencepiece_have_their_space_and_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2, "<0xF0>": 3}, [("▁", "a")], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert [vocabulary.bytes_of(token) for token in range(4)] == [b" ", b"a", b" a", b"\xf0"]


# ---- events between threads --------------------------------------------------------------------------------


def test_events_of_another_thread_come_in_order_and_none_is_lost():
    async def run():
        inbox, seen = Inbox(Bell(asyncio.get_running_loop()), 100_000, lambda: None), []

        def engine():
            listen = inbox.listener(3)
            for i in range(20_000):
                listen(Token(0, i))

        thread = threading.Thread(target=engine)
        thread.start()
        while len(seen) < 20_000:
            seen += await inbox.take(5.0)
        thread.join()
        assert [event.id for _, _, event in seen] == list(range(20_000))
        assert {source for _, source, _ in seen} == {3}

    asyncio.run(run())


def test_an_inbox_that_nobody_reads_overflows_once_and_stays_bounded():
    async def run():
        overflows = []
        inbox = Inbox(Bell(asyncio.get_running_loop()), 10, lambda: overflows.append(1))
        listen = inbox.listener(0)
        for i in range(1000):
            listen(Token(0, i))
        await asyncio.sleep(0.01)
        assert overflows == [1] and len(await inbox.take(0.1)) == 10

    asyncio.run(run())


def test_silence_ends_a_wait():
    async def run():
        inbox = Inbox(Bell(asyncio.get_running_loop()), 10, lambda: None)
        start = time.monotonic()
        assert await inbox.take(0.05) == [] and time.monotonic() - start < 1

    asyncio.run(run())


def test_a_loop_that_is_gone_ends_the_request():
    """What a listener raises ends its request in the engine."""
    loop = asyncio.new_event_loop()
    inbox = Inbox(Bell(loop), 10, lambda: None)
    loop.close()
    with pytest.raises(RuntimeError):
        inbox.listener(0)(Token(0, 1))


@pytest.mark.parametrize("why", ["behind", "gone", "late"])
def test_nobody_waits_for_a_client_that_does_not_read_why_its_stream_ends(why, monkeypatch):
    """It may be cut off at a moment in which nothing is being sent; what is sent then would wait for ever."""

    class Run:
        aborted, closed = why, False

        async def updates(self):
            raise Aborted(why)
            yield []

        def close(self):
            self.closed = True

        def usage(self):
            return Usage(1, 0, 0, 0)

    class Frames:
        def failure(self, error):
            return b"why"

    async def never(*_):
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await never()

    monkeypatch.setattr(streaming, "_LAST_WORDS", 0.05)
    run = Run()
    asyncio.run(asyncio.wait_for(EventStream(run, Frames())({"kt_log": {}}, never, send), 5))
    assert run.closed
