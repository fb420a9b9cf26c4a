"""Continuous batching: whatever else runs, an answer is that of its request alone."""

import queue
import random
import threading

import pytest
import torch
from transformers import GenerationConfig

from ktransformers import native
from ktransformers.engine.batching import BatchingEngine
from ktransformers.engine.generate import generate
from ktransformers.engine.requests import Closing, Done, Prompt, QueueFull, Request, Token
from ktransformers.engine.sampling import Sampling
from ktransformers.engine.schedule import Schedule, Ticket
from ktransformers.errors import KTransformersError
from ktransformers.operators.paged_cache import PagedCache
from tests.operators.test_native_step import made

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

TYPES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "llama4_text", "deepseek_v32")
"""Plain, latents, windows, delta nets, queries that grow, an index."""


@pytest.fixture(scope="module", params=TYPES)
def model(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made("qwen3_moe", tmp_path_factory)[1]


@pytest.fixture
def engine(plain):
    made = BatchingEngine(plain, chunk_size=32)
    yield made
    made.close()


class Heard:
    """A listener that can be waited for."""

    def __init__(self):
        self.events, self._ended, self._wanted = [], 0, 1
        self.done = threading.Event()

    def __call__(self, event):
        self.events.append(event)
        self._ended += isinstance(event, Done)
        if self._ended == self._wanted:
            self.done.set()

    @classmethod
    def of(cls, engine, request):
        heard = cls()
        heard._wanted = request.n
        heard.ticket = engine.submit(request, heard)
        return heard

    def wait(self):
        assert self.done.wait(60)
        return self

    def tokens(self, index=0):
        return [event.id for event in self.events if isinstance(event, Token) and event.index == index]

    @property
    def ends(self):
        return {event.index: event.reason for event in self.events if isinstance(event, Done)}

    @property
    def error(self):
        return next(event.error for event in self.events if isinstance(event, Done))


def prompts_of(model, count, seed=0, most=90):
    chance, words = random.Random(seed), model.config.get_text_config().vocab_size
    return [[chance.randrange(2, words) for _ in range(chance.randrange(1, most))] for _ in range(count)]


def alone(model, ids, count, chunk_size=8192):
    sampling = Sampling(GenerationConfig())
    return list(generate(model, ids, max_new_tokens=count, sampling=sampling, chunk_size=chunk_size))


def test_answers_are_those_of_requests_alone_under_random_arrivals(model):
    chance = random.Random(1)
    prompts, counts = prompts_of(model, 14), [chance.randrange(1, 25) for _ in range(14)]
    expected = [alone(model, ids, count) for ids, count in zip(prompts, counts, strict=True)]
    engine = BatchingEngine(model, max_running=5, chunk_size=24)
    try:
        heard = []
        for ids, count in zip(prompts, counts, strict=True):
            heard.append(Heard.of(engine, Request(ids, count)))
            if chance.random() < 0.5:
                threading.Event().wait(chance.random() * 0.02)
        assert [each.wait().tokens() for each in heard] == expected
        assert all(each.ends == {0: "length"} for each in heard)
        load = engine.load()
        assert load.new_tokens == sum(counts) and load.prompt_tokens == sum(map(len, prompts))
    finally:
        engine.close()


def test_a_seed_gives_the_same_answer_whatever_else_runs(plain, engine):
    sampling = Sampling(GenerationConfig(do_sample=True, temperature=1.3, top_p=0.9, top_k=0))
    ids, others = [5, 6, 7], prompts_of(plain, 6)
    first = Heard.of(engine, Request(ids, 20, sampling, seed=3)).wait().tokens()
    busy = [Heard.of(engine, Request(other, 30, sampling)) for other in others]
    again = Heard.of(engine, Request(ids, 20, sampling, seed=3)).wait().tokens()
    other = Heard.of(engine, Request(ids, 20, sampling, seed=4)).wait().tokens()
    assert first == again != other
    for each in busy:
        each.wait()


def test_several_answers_share_the_prompt(plain, engine):
    sampling = Sampling(GenerationConfig(do_sample=True, top_k=0, temperature=1.5))
    ids = prompts_of(plain, 1, seed=4)[0] * 2
    before = engine.load().prompt_tokens
    heard = Heard.of(engine, Request(ids, 12, sampling, seed=8, n=3)).wait()
    assert engine.load().prompt_tokens - before == len(ids)
    single = [Heard.of(engine, Request(ids, 12, sampling, seed=8 + i)).wait().tokens() for i in range(3)]
    assert [heard.tokens(i) for i in range(3)] == single and len(set(map(tuple, single))) == 3
    assert sum(isinstance(event, Prompt) for event in heard.events) == 1


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model(plain, engine):
    ids = prompts_of(plain, 1, seed=2)[0]
    heard = Heard.of(engine, Request(ids, 4, logprobs=3, prompt_logprobs=2)).wait()
    whole = [*ids, *heard.tokens()]
    logits = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
    given = [*heard.events[0].logprobs, *(event.logprobs for event in heard.events if isinstance(event, Token))]
    assert len(given) == len(whole) - 1
    for at, one in enumerate(given):
        assert one.chosen == pytest.approx(logits[at, whole[at + 1]].item(), abs=1e-4)
        wanted = logits[at].topk(2 if at < len(ids) - 1 else 3)
        assert [token for token, _ in one.top] == wanted.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(wanted.values.tolist(), abs=1e-4)


def test_a_prompt_alone_gives_its_probabilities_and_no_token(engine):
    heard = Heard.of(engine, Request([4, 5, 6], 0, prompt_logprobs=0)).wait()
    assert len(heard.events[0].logprobs) == 2 and heard.ends == {0: "length"} and not heard.tokens()


def test_bias_penalties_and_constraints_change_scores(plain, engine):
    ids = [3, 4, 5]
    greedy = Heard.of(engine, Request(ids, 10)).wait().tokens()
    assert Heard.of(engine, Request(ids, 5, bias={9: 1e4})).wait().tokens() == [9] * 5
    assert Heard.of(engine, Request(ids, 5, bias={9: 1e4}, presence_penalty=2e4)).wait().tokens().count(9) == 1
    twice = Heard.of(engine, Request(ids, 5, bias={9: 1e4}, frequency_penalty=1e4)).wait().tokens()
    assert twice[0] == 9 and 9 not in twice[2:]

    class Only:
        """7, then 8, and then nothing."""

        def __init__(self):
            self.seen = []

        def mask(self, scores):
            kept = scores[7 + len(self.seen)].item()
            scores.fill_(float("-inf"))
            scores[7 + len(self.seen)] = kept

        def accept(self, token):
            self.seen.append(token)
            return token == 8

    heard = Heard.of(engine, Request(ids, 10, constraint=Only)).wait()
    assert heard.tokens() == [7, 8] and heard.ends == {0: "stop"}
    assert Heard.of(engine, Request(ids, 10)).wait().tokens() == greedy


def test_a_stop_token_ends_the_answer_and_is_told(plain, engine):
    ids = [3, 4, 5]
    greedy = alone(plain, ids, 10)
    stop = greedy[6]
    heard = Heard.of(engine, Request(ids, 10, Sampling(stop_ids=[stop]))).wait()
    assert heard.tokens() == greedy[: greedy.index(stop)] and heard.events[-1].stop_id == stop
    assert heard.ends == {0: "stop"}


def test_the_context_ends_an_answer(plain):
    engine = BatchingEngine(plain, context=20)
    try:
        heard = Heard.of(engine, Request(list(range(2, 14)), 100)).wait()
        assert len(heard.tokens()) == 8 and heard.ends == {0: "length"}
        with pytest.raises(KTransformersError, match="context takes 20"):
            engine.submit(Request([2] * 20, 1), lambda event: None)
    finally:
        engine.close()


def test_a_cancelled_request_ends_and_leaves_its_place(plain):
    engine = BatchingEngine(plain, max_running=1)
    try:
        endless, waiting = Heard.of(engine, Request([3], 200)), Heard.of(engine, Request([4], 3))
        gone = Heard.of(engine, Request([5], 3))
        gone.ticket.cancel()
        endless.ticket.cancel()
        assert endless.wait().ends == gone.wait().ends == {0: "cancelled"}
        assert waiting.wait().tokens() == alone(plain, [4], 3)
    finally:
        engine.close()


def test_who_is_cancelled_while_another_is_taken_out_is_told(plain, monkeypatch):
    schedule, heard = Schedule(plain, 1, 32, 256, None, None), [Heard(), Heard()]
    first, second = (Ticket(Request([3], 5), each, i) for i, each in enumerate(heard))
    schedule.add(first)
    schedule.add(second)
    original = Schedule._take_out
    monkeypatch.setattr(Schedule, "_take_out", lambda self, gone: (second.cancel(), original(self, gone)))
    first.cancel()
    schedule.step()
    schedule.step()
    assert [each.ends for each in heard] == [{0: "cancelled"}] * 2 and schedule.is_empty


def test_one_of_several_answers_is_cancelled(plain, engine):
    heard = Heard()
    heard._wanted = 2
    ticket = engine.submit(Request([3, 4], 150, n=2), heard)
    while not heard.tokens(1):
        threading.Event().wait(0.001)
    ticket.cancel(1)
    heard.wait()
    assert heard.ends == {0: "length", 1: "cancelled"} and len(heard.tokens(1)) < 150 == len(heard.tokens(0))


@pytest.mark.parametrize("fails", ["listener", "constraint", "sampling"])
def test_what_fails_in_a_request_ends_that_request(plain, engine, fails):
    def broken(*args):
        raise ValueError("mine")

    class Broken:
        mask = accept = broken

    others = [Heard.of(engine, Request(ids, 20)) for ids in prompts_of(plain, 3)]
    heard = Heard()
    if fails == "listener":
        events = queue.Queue()
        engine.submit(Request([3], 50), lambda event: (events.put(event), isinstance(event, Token) and broken()))
        got = [events.get(timeout=60) for _ in range(3)]
        assert isinstance(got[-1], Done) and got[-1].reason == "error"
    elif fails == "constraint":
        engine.submit(Request([3], 50, constraint=Broken), heard)
        assert heard.wait().error == "mine"
    else:
        engine.submit(Request([3], 50, Sampling(GenerationConfig(do_sample=True, top_p=-1.0))), heard)
        assert "top_p" in heard.wait().error
    for each, ids in zip(others, prompts_of(plain, 3), strict=True):
        assert each.wait().tokens() == alone(plain, ids, 20)


def test_a_failing_step_ends_its_answers_and_the_engine_goes_on(plain, engine, monkeypatch):
    def broken(*args):
        raise MemoryError("none left")

    first = Heard.of(engine, Request([3, 4], 4)).wait().tokens()
    with monkeypatch.context() as patch:
        patch.setattr("ktransformers.engine.batch.Batch.step", broken)
        assert Heard.of(engine, Request([3, 4], 4)).wait().error == "none left"
    assert Heard.of(engine, Request([3, 4], 4)).wait().tokens() == first


def test_more_than_may_wait_are_refused_and_none_after_the_end(plain):
    engine = BatchingEngine(plain, max_running=1, max_waiting=2)
    heard = [Heard.of(engine, Request([3], 200))]
    with pytest.raises(QueueFull):
        for _ in range(9):
            heard.append(Heard.of(engine, Request([3], 2)))
    assert not engine.drain(0.01)
    with pytest.raises(Closing):
        engine.submit(Request([3], 2), lambda event: None)
    heard[0].ticket.cancel()
    assert engine.drain(60) and all(each.done.is_set() for each in heard)
    engine.close()
    engine.close()


def test_pages_that_run_out_let_the_last_wait_and_change_no_token(plain):
    prompts = prompts_of(plain, 6, seed=5, most=70)
    expected = [alone(plain, ids, 80) for ids in prompts]
    probe = BatchingEngine(plain)
    Heard.of(probe, Request([3], 2)).wait()
    page = probe.load().cache_bytes or probe._schedule.bytes_of(1)
    probe.close()
    engine = BatchingEngine(plain, chunk_size=40, cache_bytes=page * 3)
    try:
        Heard.of(engine, Request([3], 2)).wait()
        heard = [Heard.of(engine, Request(ids, 80)) for ids in prompts]
        assert [each.wait().tokens() for each in heard] == expected
        assert engine.load().preemptions > 0
        alone_too_long = Heard.of(engine, Request(prompts[0], 2000)).wait()
        assert alone_too_long.ends == {0: "length"} and len(prompts[0]) + len(alone_too_long.tokens()) == 193  # the last one need not be kept
        with pytest.raises(KTransformersError, match="raise the limit"):
            engine.submit(Request([3] * 200, 1), lambda event: None)
    finally:
        engine.close()


def test_lower_priorities_come_first(plain):
    engine = BatchingEngine(plain, max_running=1)
    ended = []
    try:
        blocker = Heard.of(engine, Request([3], 150))
        while not blocker.tokens():
            threading.Event().wait(0.001)
        each = []
        for name, priority in (("late", 5), ("first", 0), ("second", 0)):
            heard = Heard()
            engine.submit(Request([4], 2, priority=priority),
                          lambda event, heard=heard, name=name: (isinstance(event, Done) and ended.append(name), heard(event)))  # fmt: skip
            each.append(heard)
        blocker.ticket.cancel()
        for heard in each:
            heard.wait()
        assert ended == ["first", "second", "late"]
    finally:
        engine.close()


def test_running_answers_get_a_token_between_chunks_of_a_long_prompt(plain, monkeypatch):
    sizes, engine = [], BatchingEngine(plain, chunk_size=16)
    original = Schedule._compute_prompts

    def counting(self):
        before = self.load.prompt_tokens, self.load.new_tokens
        original(self)
        sizes.append((self.load.prompt_tokens - before[0], len(self._running)))

    monkeypatch.setattr(Schedule, "_compute_prompts", counting)
    try:
        running = Heard.of(engine, Request([3], 120))
        while not running.tokens():
            threading.Event().wait(0.001)
        long = Heard.of(engine, Request([4] * 90, 1)).wait()
        running.wait()
        assert max(size for size, _ in sizes) <= 16 and len(long.tokens()) == 1
        assert sum(bool(size) and bool(others) for size, others in sizes) >= 5
    finally:
        engine.close()


def test_whole_decoders_run_as_one_ragged_batch(plain, monkeypatch):
    from ktransformers.engine.batch import Batch

    widths, original = [], Batch._together

    def counting(self, tokens):
        assert type(self._joined) is PagedCache
        widths.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(Batch, "_together", counting)
    engine = BatchingEngine(plain)
    try:
        for each in [Heard.of(engine, Request(ids, 20)) for ids in prompts_of(plain, 5)]:
            each.wait()
        assert max(widths) == 5
    finally:
        engine.close()


def test_what_requests_have_in_common_is_computed_once(model):
    from ktransformers.engine.prefix_tree import PrefixTree

    shared = prompts_of(model, 1, seed=9, most=90)[0] * 40
    prompts = [[*shared[:150], *rest] for rest in prompts_of(model, 4, seed=11, most=40)]
    # In chunks as the engine's: where an index chooses keys, those of transformers change its results, too.
    expected = [alone(model, ids, 12, chunk_size=64) for ids in prompts]
    tree = PrefixTree(model, b"test", 1 << 26)
    engine = BatchingEngine(model, chunk_size=64, prefixes=tree)
    try:
        first = Heard.of(engine, Request(prompts[0], 12)).wait()
        others = [Heard.of(engine, Request(ids, 12)).wait() for ids in prompts[1:]]
        assert [each.tokens() for each in (first, *others)] == expected
        assert first.events[0].cached_tokens == 0
        assert [each.events[0].cached_tokens for each in others] == [128] * 3
        longer = [*prompts[0], *first.tokens(), 5, 6, 7]  # the next turn of a conversation
        assert Heard.of(engine, Request(longer, 5)).wait().tokens() == alone(model, longer, 5, chunk_size=64)
        assert engine.load().cached_tokens >= 4 * 128
        scored = Heard.of(engine, Request(prompts[0], 1, prompt_logprobs=0)).wait()
        assert scored.events[0].cached_tokens == 0 and len(scored.events[0].logprobs) == len(prompts[0]) - 1
    finally:
        engine.close()
