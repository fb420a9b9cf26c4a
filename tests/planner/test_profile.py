"""Routing profiles: counted while a model runs, kept in a file that nobody needs to trust, made by `kt profile`."""

import json
import os
from pathlib import Path

import pytest
import torch
from ktransformers.models import embedded_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ktransformers import cli, optimize_and_load
from ktransformers.cli import profile as command
from ktransformers.errors import KTransformersError
from ktransformers.planner.masks import gpu_experts
from ktransformers.planner.profile import MAX_BYTES, RoutingProfile, record
from tests import families
from tests.tiny import meta_model, random_ids, randomize, save, tiny_model


def run(model, *batches):
    with record(model) as profile, torch.no_grad():
        results = [model(ids).logits for ids in batches]
    return profile, results


def routed(model, ids):
    """The truth: what the routers of a Qwen3-MoE choose, counted by their own outputs."""
    found = {}

    def look(layer):
        return lambda module, args, output: found.update({layer: output[2].flatten().bincount(minlength=8).tolist()})

    handles = [layer.mlp.gate.register_forward_hook(look(n)) for n, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


# --- counting ---------------------------------------------------------------------------------------------------------


def test_every_choice_of_every_token_is_counted_once():
    model, ids = tiny_model("qwen3_moe"), random_ids(2, 11)
    profile, (logits,) = run(model, ids)
    assert profile.layers == routed(model, ids)
    assert (profile.model_type, profile.tokens, profile.hits) == ("qwen3_moe", 22, 3 * 22 * 3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert profile.tokens == 22, "counted after the block had ended"
    twice, _ = run(model, ids, ids)
    assert twice.layers == {layer: [2 * n for n in counts] for layer, counts in profile.layers.items()}


@pytest.mark.parametrize("gpu_experts_", [None, "0-3"])
def test_operators_are_counted_as_transformers_experts_are(gpu_experts_, tmp_path):
    model, ids = tiny_model("qwen3_moe"), random_ids(2, 11)
    kwargs = {"generate_device": "cpu", "prefill_device": "cpu", "gpu_experts": gpu_experts_, "gpu_device": "cpu"}
    name = "ktransformers.operators.experts.KTransformersExperts"
    rule = [{"match": {"trait": "experts"}, "replace": {"class": name, "kwargs": kwargs}}]
    ours = optimize_and_load(meta_model(model.config), rule, save(model, tmp_path), progress=False)
    assert run(ours, ids)[0] == run(model, ids)[0]


def test_prompt_and_generated_tokens_count():
    model, ids = tiny_model("mixtral"), random_ids(1, 7)
    with record(model) as profile:
        model.generate(ids, max_new_tokens=6, do_sample=False)
    assert profile.tokens == 7 + 5  # the last one is chosen, and never computed
    assert all(sum(counts) == 12 * 2 for counts in profile.layers.values())


@pytest.mark.parametrize("model_type", families.known_here())
def test_every_family_is_counted(model_type):
    """Nine tokens have as many choices in each layer as the family makes; Llama-4's experts see no choices, only rows."""
    if model_type == "longcat_flash":
        pytest.skip("some of its experts pass their input on, and are not counted")
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(families.config_of(model_type)).eval())
    profile, _ = run(model, random_ids(1, 9))
    assert profile.layers and profile.tokens == 9
    assert {sum(counts) % 9 for counts in profile.layers.values()} == {0} != {*map(sum, profile.layers.values())}


def test_experts_that_pass_their_input_on_are_no_ones_hit():
    torch.manual_seed(0)
    model = randomize(AutoModelForCausalLM.from_config(families.config_of("longcat_flash")).eval())
    profile, _ = run(model, random_ids(1, 40))
    assert {len(counts) for counts in profile.layers.values()} == {8}
    assert 0 < profile.hits < 40 * 3 * len(profile.layers)


def test_hooks_are_gone_when_the_block_raises():
    model = tiny_model("qwen3_moe")
    with pytest.raises(ZeroDivisionError), record(model):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_experts_is_refused():
    with pytest.raises(KTransformersError, match="Linear has no routed experts"):
        model = torch.nn.Linear(2, 2)
        model.config = None
        with record(model):
            pass


# --- numbers ----------------------------------------------------------------------------------------------------------

KNOWN = RoutingProfile("x", {1: [10, 0, 0, 0, 0], 4: [1, 2, 3, 4, 0]}, tokens=10)


def test_hit_rate_and_skew():
    assert KNOWN.hits == 20
    assert KNOWN.hit_rate({1: [0], 4: [3, 3], 9: [0]}) == 14 / 20 and KNOWN.hit_rate({}) == 0
    assert KNOWN.top_share() == 10 / 20 and KNOWN.top_share(0.2) == 14 / 20 and KNOWN.top_share(layers=[4]) == 2 / 10
    assert RoutingProfile("x", {0: [3] * 8}, 3).top_share() == pytest.approx(0.1)
    assert KNOWN.top_share(1.0) == 1 and KNOWN.top_share(layers=[]) == 0
    assert RoutingProfile("x").hit_rate({1: [0]}) == 0


def test_a_profile_knows_whose_it_is():
    KNOWN.require([4, 1], 5, "x")
    for arguments, message in (
        (([4, 1], 5, "y"), "found model type x, expected y"),
        (([1, 2], 5), "found layers 1,4, expected 1-2"),
        (([1, 4], 6), "found 5 experts per layer, expected 6"),
    ):
        with pytest.raises(KTransformersError, match=message):
            KNOWN.require(*arguments)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_reads_back(tmp_path):
    KNOWN.write(tmp_path / "p.json")
    KNOWN.write(tmp_path / "p.json")  # over the old one
    assert RoutingProfile.read(tmp_path / "p.json") == KNOWN
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def valid(**changes):
    data = {"format": "ktransformers routing profile", "version": 1, "model_type": "x", "tokens": 9, "layers": {"0": [9]}}
    return data | changes


HOSTILE = [
    ("", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ("\x00", "no JSON"),
    ("9" * 5000, "no JSON"),
    ("[]", "something else"),
    ("{}", "something else"),
    (valid(version=2), "version '2', this release reads 1"),
    (valid(version=None), "version 'None'"),
    (valid(model_type=7), "no model_type"),
    (valid(tokens=-1), "tokens '-1'"),
    (valid(tokens=True), "tokens 'True'"),
    (valid(layers={}), "no layers"),
    (valid(layers=[[1]]), "no layers"),
    (valid(layers={"-1": [1]}), "a layer named '-1'"),
    (valid(layers={"01": [1]}), "a layer named '01'"),
    (valid(layers={"9999999": [1]}), "a layer named '9999999'"),
    (valid(layers={"0": []}), "layer 0 without a list of counts"),
    (valid(layers={"0": {"1": 1}}), "layer 0 without a list of counts"),
    (valid(layers={"0": [1, -2]}), "a count of '-2' in layer 0"),
    (valid(layers={"0": [1.5]}), "a count of '1.5' in layer 0"),
    (valid(layers={"0": [float("nan")]}), "a count of 'nan' in layer 0"),
    (valid(layers={"0": [False]}), "a count of 'False' in layer 0"),
    (valid(layers={"0": [1 << 70]}), "a count of '1180591620717411303424' in layer 0"),
    (valid(layers={"0": [7, 12]}), "19 choices of 2 experts for 9 tokens in layer 0"),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_a_hostile_file_is_refused(content, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(KTransformersError, match="expected a routing profile. Make one with `kt profile") as error:
        RoutingProfile.read(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(KTransformersError, match="cannot be read: No such file"):
        RoutingProfile.read(tmp_path / "none.json")
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(KTransformersError, match="no ordinary file"):
            RoutingProfile.read(path)
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(KTransformersError, match=f"{MAX_BYTES + 1} bytes"):
        RoutingProfile.read(tmp_path / "huge.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_written_is_one_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in ("/dev/full", tmp_path, tmp_path / "none" / "p.json", tmp_path / "file" / "p.json", "a\x00b"):
        with pytest.raises(KTransformersError, match="the routing profile cannot be written"):
            KNOWN.write(path)
    path = tmp_path / "p.json"
    KNOWN.write(path)

    def full(self, *_, **__):
        with open(self, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KTransformersError, match=r"p\.json: the routing profile cannot be written: No space left"):
        RoutingProfile("y").write(path)
    assert RoutingProfile.read(path) == KNOWN and sorted(os.listdir(tmp_path)) == ["file", "p.json"]


# --- the command ------------------------------------------------------------------------------------------------------


def kt_profile(*arguments):
    return CliRunner().invoke(cli.app, ["profile", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('What is MLA?\n\n{"prompt": "What is a rule file?"}\n{not JSON, but a prompt}\n')
    return path


def test_prompts_of_a_file(prompts, tmp_path):
    expected = [(1, "What is MLA?"), (3, "What is a rule file?"), (4, "{not JSON, but a prompt}")]
    assert command.read_prompts(prompts) == expected
    lines = tmp_path / "p.jsonl"
    for line in ("{not JSON}", "text", '{"text": "a"}', '{"prompt": 7}', '{"prompt": " "}'):
        lines.write_text('{"prompt": "good"}\n' + line)
        with pytest.raises(KTransformersError, match=r"p\.jsonl:2: found .*expected a JSON object"):
            command.read_prompts(lines)


def test_the_command_counts_prompts_and_answers(prompts, tmp_path):
    """The embedded model: 2 layers of 8 experts, of which each token takes 2."""
    output = tmp_path / "p.json"
    ran = kt_profile(embedded_model(), "--prompts", prompts, "--max-new-tokens", 4, "-o", output, "--json")
    assert ran.exit_code == 0, ran.output
    data, found = json.loads(ran.stdout), RoutingProfile.read(output)
    assert (data["profile"], data["model_type"], data["prompts"]) == (str(output), "deepseek_v3", 3)
    assert data["hits"] == found.hits == found.tokens * 2 * 2 and data["tokens"] == found.tokens
    assert data["groups"][0] | {"top_share": 0} == {
        "layers": "1", "hits": found.tokens * 2, "top_share": 0, "never_chosen": found.layers[1].count(0), "experts": 8,
    }  # fmt: skip
    masks = gpu_experts("frequency", [1, 2], 8, 8, found)
    assert found.hit_rate(masks) >= 0.5
    short = kt_profile(embedded_model(), "--prompts", prompts, "--max-new-tokens", 1, "-o", output, "--force", "--json")
    fewer = json.loads(short.stdout)["tokens"]  # an answer's last token is chosen, and never computed
    assert data["tokens"] == fewer + 3 * 3


def test_the_table_is_readable_at_100_columns(prompts, tmp_path):
    gguf = next(embedded_model().glob("*.gguf"))
    ran = kt_profile(gguf, "--prompts", prompts, "--max-new-tokens", 2, "-o", tmp_path / "p.json")
    assert ran.exit_code == 0, ran.output
    assert "share of the top 10% of experts" in ran.stdout and "p.json" in ran.stdout
    assert max(map(len, ran.stdout.splitlines()[:-1])) <= 100


def test_deep_models_are_shown_in_groups():
    deep = RoutingProfile("x", {layer: [layer, 1] for layer in range(3, 61)}, tokens=60)
    groups = command.summary(deep)
    assert [group.layers for group in groups][:2] == ["3-10", "11-18"] and len(groups) <= command.GROUPS
    assert sum(group.hits for group in groups) == deep.hits


BAD = [
    (["--prompts", "/no/such/file"], "--prompts /no/such/file: cannot be read: No such file or directory. Check"),
    (["--prompts", "{empty}"], "is empty, expected one prompt per line"),
    (["--prompts", "{long}"], "tokens, but the model takes 1024"),
    (["--prompts", "{good}", "-o", "/no/such/folder/p.json"], "its folder does not exist"),
    (["--prompts", "{good}", "--devices", "cuda"], "expected NAME=NAME"),
    (["--prompts", "{good}", "--rule", "DeepSek-V3"], "did you mean 'DeepSeek-V3'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_error_and_exit_code_1(arguments, message, prompts, tmp_path):
    files = {"empty": tmp_path / "empty", "long": tmp_path / "long", "good": prompts}
    files["empty"].write_text("\n \n")
    files["long"].write_text("word " * 2000)
    ran = kt_profile(embedded_model(), "-o", tmp_path / "p.json", *(text.format(**files) for text in arguments))
    assert ran.exit_code == 1 and message in ran.output.replace("\n", ""), ran.output
    assert not (tmp_path / "p.json").exists()
