"""`kt bench`: every size at every depth, as a table and as JSON, and each mistake is one line."""

import json
from functools import cache

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.engine import measure as engine
from ktransformers.engine.load import load
from ktransformers.engine.measure import measure, total_tokens
from ktransformers.errors import KTransformersError
from tests import families
from tests.tiny import randomize


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def test_json_and_table():
    sizes = ("-p", 8, "-p", 24, "-n", 3, "-d", 0, "-d", 70, "--repetitions", 2)
    ran = run(*sizes, "--cache", "q8_0", "--chunk-size", 16, "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert (found["cache"], found["chunk_size"], found["threads"] >= 1) == ("q8_0", 16, True)
    rows = [(s["work"], s["tokens"], s["depth"], len(s["rates"])) for s in found["speeds"]]
    assert rows == [(*work, depth, 2) for depth in (0, 70) for work in (("prefill", 8), ("prefill", 24), ("decode", 3))]
    assert all(min(s["rates"]) <= s["rate"] <= max(s["rates"]) for s in found["speeds"])
    ran = run(*sizes)
    rows = [line.split("│")[1].strip() for line in ran.stdout.splitlines() if line.startswith("│")]
    assert ran.exit_code == 0 and rows == ["prefill 8", "prefill 24", "decode 3"] * 2


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_what_is_timed_is_what_was_asked_for(kind, monkeypatch):
    """By the tokens that go through the model while the clock runs, of models whose caches can go back or cannot."""
    model = randomize(AutoModelForCausalLM.from_config(families.config_of(kind)).eval())
    done, marks, passed = [], [], []
    model.register_forward_pre_hook(lambda _, __, given: done.append(given["input_ids"].shape[1]), with_kwargs=True)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: marks.append(sum(done)) or len(marks))
    found = list(measure(model, [5], [3], [0, 9], repetitions=2, chunk_size=4, on_tokens=passed.append))
    rows = [("prefill", 5, 0), ("decode", 3, 0), ("prefill", 5, 9), ("decode", 3, 9)]
    assert [(s.work, s.tokens, s.depth) for s in found] == rows
    timed = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    assert timed == [5, 1] + [5, 5, 3, 3] * 2 and sum(passed) == total_tokens([5], [3], [0, 9], 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompts": [0]}, "prompt tokens: found 0, expected at least 1"),
        ({"new_tokens": [4, -1]}, "new tokens: found -1"),
        ({"depths": [-1]}, "depth: found -1, expected at least 0"),
        ({"repetitions": 0}, "repetitions: found 0"),
        ({"chunk_size": 0}, "chunk size: found 0"),
        ({"depths": [0, 1000], "prompts": [30]}, "depth and tokens: found 1064 together, the model takes 1024"),
    ],
)
def test_sizes_of_no_sense_are_told_before_anything_is_computed(sizes, message):
    with pytest.raises(KTransformersError, match=message):
        next(measure(embedded(), **sizes))


@cache
def embedded():
    return load()[0]
