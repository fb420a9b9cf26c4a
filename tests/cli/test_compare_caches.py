"""`kt cache compare`: bytes are those of the pages, divergences those of the logits, and each mistake is one line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ktransformers import cli, optimize_and_load
from ktransformers.engine.compare_caches import compare, own_text
from ktransformers.engine.load import load
from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.operators.paged_cache import paged_cache
from tests.tiny import meta_model, random_ids


def run(*arguments):
    return CliRunner().invoke(cli.app, ["cache", "compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def model():
    return load()[0]


def test_json_and_table(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A rule file is a short YAML list that says which modules become which operators. " * 8)
    ran = run("--text", text, "--tokens", 96, "--chunk-size", 32, "--json")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    own, q8_0 = found["types"]
    assert (found["tokens"], found["chunk_size"]) == (96, 32)
    assert (own["type"], own["bytes_per_token"], own["kl_max"], own["same_top"]) == ("bf16", 1728, 0.0, 1.0)
    assert (q8_0["type"], q8_0["bytes_per_token"]) == ("q8_0", 918)
    assert 0 < q8_0["kl_mean"] < 0.05 and q8_0["kl_mean"] < q8_0["kl_max"] and q8_0["same_top"] > 0.9
    ran = run("--tokens", 40, "--type", "f16", "--type", "bf16")
    rows = [line for line in ran.stdout.splitlines() if line.startswith("│")]
    assert ran.exit_code == 0 and [row.split()[1] for row in rows] == ["bf16", "f16"]


def test_numbers_are_those_of_the_logits(model):
    """By hand: both caches over the same chunks, divergences by torch's own function."""
    ids = own_text(model, 0, 100)
    assert ids == own_text(model, 0, 100) and len(ids) == 100
    passed = []
    own, found = compare(model, ids, ["q8_0", "q8_0", "bf16"], 48, passed.append)
    assert passed == [48, 48, 48, 48, 4, 4]
    logs = []
    with torch.inference_mode():
        for kind in ("bf16", "q8_0"):
            cache = paged_cache(model, kind)
            out = [model(part, past_key_values=cache).logits[0].float() for part in torch.tensor([ids]).split(48, 1)]
            logs.append(torch.cat(out).log_softmax(-1))
    each = torch.nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    assert found.kl_mean == pytest.approx(each.mean().item(), rel=1e-3) and found.kl_max == pytest.approx(
        each.max().item(), rel=1e-3
    )
    assert found.same_top == (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item()
    for one, log in ((own, logs[0]), (found, logs[1])):
        loss = torch.nn.functional.nll_loss(log[:-1], torch.tensor(ids[1:]))
        assert one.perplexity == pytest.approx(loss.exp().item(), rel=1e-4)


def test_mistakes_are_one_line(model, checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Hello")
    binary = tmp_path / "binary"
    binary.write_bytes(b"a\x90")
    for arguments, message in [
        (("--type", "q4"), "--type 'q4': expected one of f32, f16, bf16, q8_0, fp8"),
        (("--text", tmp_path / "none"), "--text"),
        (("--text", binary), "byte 1 is not UTF-8. Give a text file"),
        (("--text", short, "--tokens", 300), "expected at least 300. Give a longer text"),
        (("--tokens", 5000), "--tokens 5000: the model takes 1024"),
    ]:
        ran = run(*arguments)
        assert ran.exit_code == 1 and ran.stdout == "" and message in ran.stderr, ran.output
    with pytest.raises(KTransformersError, match="found 1 in chunks of 64"):
        compare(model, [1], ["q8_0"])
    reference, folder = checkpoint("qwen3_moe")
    nothing = [{"match": {"name": "^model$"}, "replace": {"class": "default"}}]
    plain = optimize_and_load(meta_model(reference.config), nothing, folder, default_device="cpu")
    with pytest.raises(UnsupportedError, match="no layer of Qwen3MoeForCausalLM computes on pages"):
        compare(plain, random_ids(1, 8)[0].tolist(), ["q8_0"])
