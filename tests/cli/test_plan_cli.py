"""`kt plan`: tables, JSON, exit codes, files written, and bad input of every kind."""

import json
import re

import pytest
from ktransformers.models import embedded_model
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.cli import plan
from ktransformers.rules.plan import load_rules

BOX = ("--ram", "64GiB")


def kt(*arguments):
    ran = CliRunner().invoke(cli.app, ["plan", *arguments])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def test_a_plan_that_fits_reads_well_at_100_columns():
    ran = kt("qwen3-30b-a3b", *BOX, "--gpu", "24GiB", "--format", "q4_k_m")
    assert ran.exit_code == 0 and "fits" in ran.stdout.splitlines()[0]
    for word in ("cuda:0", "layers 0-47", "experts", "tokens/s", "bottleneck", "capacity", "decode at context 1024", "-o rule.yaml"):
        assert word in ran.stdout, word
    assert max(map(len, ran.stdout.splitlines())) <= 100 and "\x1b" not in ran.stdout


def test_the_parameters_of_a_small_model_are_no_zeros():
    assert re.search(r"\(\d\.\dM parameters, \d+\.\d[KM] active\)", kt(str(embedded_model()), *BOX).stdout)
    numbers = (671e9, 5e7, 49e6, 5e4, 49e3, 12)
    assert [plan._count(int(n)) for n in numbers] == ["671.0B", "0.1B", "49.0M", "0.1M", "49.0K", "0.0K"]


def test_json_is_one_object_with_bytes_and_tokens_per_second():
    ran = kt("deepseek-v2-lite", *BOX, "--gpu", "12GiB", "--json")
    data = json.loads(ran.stdout)
    assert data["fits"] is True and ran.exit_code == 0
    assert data["parameters"] == pytest.approx(15.7e9, rel=0.01)
    for device, memory in data["memory"].items():
        assert memory["total"] == memory["weights"] + memory["cache"] + memory["work"] <= memory["limit"], device
    for name in ("prefill", "decode", "decode_full_context"):
        one = data[name]
        assert one["tokens_per_second"] == pytest.approx(one["tokens"] / sum(one["seconds"].values()))
    assert load_rules_of(data["rule"])


def test_speed_on_a_gpu_is_called_an_estimate():
    words = "estimate (not measured on a GPU)"
    for gpu in ((), ("--gpu", "24GiB")):
        ran, data = kt("qwen3-30b-a3b", *BOX, *gpu), json.loads(kt("qwen3-30b-a3b", *BOX, *gpu, "--json").stdout)
        assert (words in ran.stdout) is bool(gpu) and data["speed_basis"] == (words if gpu else None)
    assert data["memory"]["cuda:0"]["dense"] == data["memory"]["cuda:0"]["weights"]  # published in BF16


def test_linear_layers_are_quantized_where_asked_for(tmp_path):
    path = tmp_path / "rule.yaml"
    said = re.sub(r"\s+", " ", kt("glm-4.5-air", "--ram", "1TiB", "--gpu", "12GiB").stdout)
    assert "with --linear-op KLinearMarlin, which quantizes while loading" in said
    ran = kt("glm-4.5-air", "--ram", "1TiB", "--gpu", "12GiB", "--linear-op", "KLinearMarlin", "-o", str(path))
    assert "layers 0-45" in ran.stdout and "generate_op: KLinearMarlin" in path.read_text() and load_rules(path)


def load_rules_of(text):
    import yaml

    return load_rules(yaml.safe_load(text))


def test_what_does_not_fit_has_exit_code_1_and_says_what_would(tmp_path):
    path = tmp_path / "rule.yaml"
    ran = kt("deepseek-v3", *BOX, "-o", str(path))
    assert ran.exit_code == 1 and "does not fit" in ran.stdout and "more RAM fits" in ran.stdout
    assert "tokens/s" not in ran.stdout and "Expected speed" not in ran.stdout  # of what cannot run
    data = json.loads(kt("deepseek-v3", *BOX, "--json").stdout)
    assert (data["fits"], data["prefill"], data["decode"], data["decode_full_context"]) == (False, None, None, None)
    assert load_rules(path) and path.read_text().startswith("# deepseek-v3, published (FP8)")


def test_the_written_rule_file_passes_check_and_simulation(tmp_path):
    from ktransformers.configs import meta_model, read_config
    from ktransformers.rules.chain import chain_problems
    from ktransformers.rules.plan import plan

    path = tmp_path / "rule.yaml"
    kt("glm-4.5-air", "--ram", "128GiB", *["--gpu", "16GiB"] * 2, "--format", "Q4_K_M", "-o", str(path))
    model = meta_model(read_config("glm-4.5-air"))
    found = plan(model, path, gpus=2)
    assert not [p for p in chain_problems(model, found) if not p.warning]
    assert {r.device for r in found.values()} == {"cuda:0", "cuda:1", "cpu"}


@pytest.mark.parametrize("gpus", ["2x16GiB", "2x4060ti-16g"])
def test_several_gpus_are_given_at_once(gpus):
    data = json.loads(kt("qwen3-30b-a3b", *BOX, "--gpu", gpus, "--format", "Q4_K_M", "--json").stdout)
    assert list(data["memory"]) == ["cpu", "cuda:0", "cuda:1"] and len(data["hardware"]["gpus"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qwen3-30b-a3b", "--gpu", "65x24GiB", *BOX), "expected 1 to 64"),
        (("qwen3-30b-a3b", "--gpu", "40x24GiB", "--gpu", "40x24GiB", *BOX), "found 80 GPUs, expected at most 64"),
        (("qwen3-30b-a3b", "--gpu", "24", *BOX), "24GiB"),
        (("qwen3-30b-a3b", "--gpu", "-3GiB", *BOX), "above zero"),
        (("qwen3-30b-a3b", "--gpu", "5PiB", *BOX), "expected"),
        (("qwen3-30b-a3b", "--gpu", "rtx9999", *BOX), "no known GPU"),
        (("qwen3-30b-a3b", "--ram", "64"), "64GiB"),
        (("qwen3-30b-a3b", "--ram", "64GiB@fast"), "64GiB@fast"),
        (("qwen3-30b-a3b", "--cores", "8"), "--ram"),
        (("qwen3-30b-a3c", *BOX), "did you mean 'qwen3-30b-a3b'"),
        (("/no/such/folder", *BOX), "/no/such/folder"),
        (("qwen3-30b-a3b", *BOX, "--format", "Q4_K_X"), "--format 'Q4_K_X': unknown"),
        (("qwen3-30b-a3b", *BOX, "--strategy", "best"), "strategy: 'best' unknown"),
        (("qwen3-30b-a3b", *BOX, "--linear-op", "KLinearMarlyn"), "did you mean 'KLinearMarlin'"),
        (("qwen3-30b-a3b", *BOX, "--gpu", "24GiB", "--strategy", "frequency"), "kt profile"),
        (("qwen3-30b-a3b", *BOX, "--profile", "/no/profile.json"), "/no/profile.json"),
        (("qwen3-30b-a3b", *BOX, "--weights", "/no/weights"), "/no/weights"),
        (("qwen3-30b-a3b", *BOX, "-o", "/no/such/folder/rule.yaml"), "-o /no/such/folder/rule.yaml"),
        (("qwen3-30b-a3b", *BOX, "--plot", "/tmp"), "--plot /tmp"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    ran = kt(*arguments)
    assert ran.exit_code in (1, 2), ran.stdout
    said = re.sub(r"\s+", " ", ran.stderr)
    assert message in said and "Traceback" not in said and ran.stdout == "", said


def test_a_config_of_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "quasar_moe", "hidden_size": 8}))
    ran = kt(str(tmp_path), *BOX)
    assert ran.exit_code == 1 and "quasar_moe" in ran.stderr and "Traceback" not in ran.stderr


def test_a_model_without_experts_is_refused_by_name(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ran = kt(str(tmp_path), *BOX)
    assert ran.exit_code == 1 and "LlamaForCausalLM has no routed experts" in re.sub(r"\s+", " ", ran.stderr)


def test_weights_give_types_and_a_disagreeing_header_is_an_error(checkpoint):
    _, folder = checkpoint("qwen3_moe")
    _, other = checkpoint("qwen3_moe", moe_intermediate_size=48)
    ran = kt(str(folder), *BOX, "--weights", str(folder), "--json")
    assert json.loads(ran.stdout)["format"] == "model.safetensors"
    ran = kt(str(folder), *BOX, "--weights", str(other))
    assert ran.exit_code == 1 and "does not fit" in ran.stderr and "experts" in ran.stderr


def test_a_plot_is_written_or_the_missing_library_is_named(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    ran = kt("qwen3-30b-a3b", *BOX, "--gpu", "12GiB", "--format", "Q4_K_M", "--plot", str(path))
    assert ran.exit_code == 0 and path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    ran = kt("qwen3-30b-a3b", *BOX, "--plot", str(path), "--force")
    assert ran.exit_code == 1 and "pip install matplotlib" in ran.stderr


def test_this_machine_is_measured_without_flags():
    ran = kt("models/embedded", "--json")
    data = json.loads(ran.stdout)
    assert data["hardware"]["cpu"]["read_bandwidth"] > 1e8 and data["prefill"]["tokens_per_second"] > 0
