"""The memory of training: what is predicted beside what a run took, and what moves it."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.errors import SFTError
from ktransformers.sft.read import made_of
from tests import families, tiny

pytest.importorskip("trl")
memory = pytest.importorskip("ktransformers.sft.memory")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOM = {"cpu": 64 << 30}


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory):
    """24 examples of more than 512 tokens, for the embedded model's tokenizer."""
    rows = [{"instruction": "Count.", "input": "", "output": " ".join(map(str, range(i, i + 400)))} for i in range(24)]
    file = tmp_path_factory.mktemp("long") / "long.json"
    file.write_text(json.dumps(rows))
    return file


def predicted(**given):
    found = memory.predict(made_of({"cutoff_len": 256, "per_device_train_batch_size": 2, **given}), ROOM)
    return found.memory["cpu"]


@pytest.mark.parametrize("keys", [{}, {"disable_gradient_checkpointing": True}, {"cutoff_len": 64}], ids=["again", "kept", "short"])
def test_a_run_takes_what_was_predicted_within_a_tenth(long_dataset, tmp_path, keys):
    given = {"cutoff_len": 512, "per_device_train_batch_size": 8, "lora_rank": 8, "max_steps": 3, **keys}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"dataset": str(long_dataset), "output_dir": str(tmp_path / "out"), **given}))  # JSON is YAML
    run = subprocess.run([sys.executable, "-m", "ktransformers", "sft", str(file), "--json"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    done = json.loads(run.stdout)
    assert done["expected_bytes"] == pytest.approx(done["peak_bytes"], rel=0.1)
    assert "memory at most" in run.stderr
    assert predicted(**given)["total"] == pytest.approx(done["expected_bytes"], rel=0.01)


def test_what_moves_it():
    plain, kept = predicted(), predicted(disable_gradient_checkpointing=True)
    assert kept["activations"] > plain["activations"] and kept["weights"] == plain["weights"]
    twice = predicted(lora_rank=16)
    assert twice["trained"] == 2 * plain["trained"] and twice["optimizer"] == pytest.approx(2 * plain["optimizer"], rel=0.01)
    assert plain["gradients"] <= plain["trained"] and plain["optimizer"] == pytest.approx(2 * plain["gradients"], rel=0.01)
    assert predicted(per_device_train_batch_size=8)["activations"] > 2.5 * plain["activations"]
    assert predicted(stage="dpo")["activations"] > 1.5 * plain["activations"]
    assert predicted(optim="sgd")["optimizer"] == 0
    assert predicted(kt_backend="AMXINT4_SFT_SkipLoRA", lora_target="q_a_proj,o_proj")["trained"] < 0.5 * plain["trained"]


def kept_of(model, ids):
    """Bytes that a forward of a real model keeps for its backward, its parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(inputs_embeds=embedded(model, ids), labels=ids)  # noqa: F841  alive, as a loss is
        return sum(kept.values())


def embedded(model, ids):
    return model.get_input_embeddings()(ids).requires_grad_()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_what_a_family_keeps_for_its_backward_is_seen(family, tmp_path):
    """All that a real forward keeps is alive in the simulated one, and not much more: its last operations are."""
    from ktransformers.models import DEFAULT_RULES

    from ktransformers import optimize_and_load
    from ktransformers.simulator import training

    config = families.config_of(family)
    model = tiny.build(config)
    tiny.save(model, tmp_path)
    ids = torch.randint(0, 128, (2, 96))
    rule = DEFAULT_RULES.get(config.model_type, "Default")
    real = optimize_and_load(tiny.meta_model(config), rule, tmp_path, devices={"cuda": "cpu"}, progress=False).train()
    expected = kept_of(real.requires_grad_(False), ids)

    def loss(net):
        fake = torch.zeros((2, 96), dtype=torch.int64)
        return net.requires_grad_(False)(inputs_embeds=embedded(net, fake), labels=fake).loss

    found = training.simulate_training(config, rule, lambda net: net, loss, lambda trained: torch.optim.SGD([torch.zeros(1)]))
    kept = found.activations["cpu"] / (1 + training.FRAGMENTS[False])
    assert expected <= kept <= 1.3 * expected + (1 << 20)


def kt(*arguments):
    ran = CliRunner().invoke(cli.app, ["plan", *arguments])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """A folder with the config of Qwen3-30B-A3B, but for its layers."""
    from ktransformers.configs import read_config

    config = read_config("qwen3-30b-a3b")
    config.num_hidden_layers = 2
    config.save_pretrained(folder := tmp_path_factory.mktemp("two"))
    return str(folder)


def test_the_command_takes_a_model_or_a_training_file(tmp_path, two_layers):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: x.json\ncutoff_len: 64\nper_device_train_batch_size: 3\ndo_train: true\noutput_dir: out\n")
    ran = kt(str(file), "--train", "--ram", "8GiB")
    assert ran.exit_code == 0 and "3 sequences of 64 tokens" in ran.stdout and "values are trained" in ran.stdout
    data = json.loads(kt(two_layers, "--train", "--format", "Q4_K_M", "--ram", "64GiB", "--context", "512", "--json").stdout)
    cpu = data["memory"]["cpu"]
    assert data["fits"] and data["tokens"] == 512 and 1.0 < cpu["weights"] / 2**30 < 1.3
    assert cpu["trained"] == 4 * data["trained"] and sum(cpu[part] for part in memory.PARTS) == cpu["total"]


def test_what_does_not_fit_says_so_and_exits_with_1(two_layers):
    ran = kt(two_layers, "--train", "--format", "Q4_K_M", "--ram", "1GiB", "--context", "64")
    assert ran.exit_code == 1 and "does not fit" in ran.stdout and "cutoff_len" in ran.stdout


@pytest.mark.parametrize(("flags", "message"), [
    (["--batch", "2"], "--batch and --train"), (["-o", "rule.yaml"], "--output and --train"), (["--gpu", "24GiB"], "CPU build of torch"),
])  # fmt: skip
def test_flags_of_inference_are_refused(flags, message):
    ran = kt("qwen3-30b-a3b", "--train", "--ram", "64GiB", *flags)
    assert ran.exit_code == 1 and message in " ".join(ran.stderr.split())


def test_a_step_that_cannot_be_simulated_is_said(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such thing\nmore")

    monkeypatch.setattr(memory, "simulate_training", broken)
    with pytest.raises(SFTError, match="cannot be simulated, so its memory is not known: no such thing$"):
        predicted()
