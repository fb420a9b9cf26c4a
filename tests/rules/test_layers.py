"""The extended form of rule files: `devices`, the device `layer`, `variables`, `expect`."""

import re

import pytest
import torch
from ktransformers.models.traits import find_layers
from ktransformers.optimize_rules import NAMES

from ktransformers import optimize_and_load
from ktransformers.errors import RuleError
from ktransformers.rules.plan import load_rules, packaged_rules, plan
from tests.rules.test_packaged import MODELS
from tests.tiny import meta_model, random_ids, relative_error

LINEAR = "ktransformers.operators.linear.KTransformersLinear"
LINEARS = {"match": {"trait": "linear"}, "replace": {"class": LINEAR, "device": "layer"}}
DECODER = {"match": {"trait": "decoder"}, "replace": {"class": "ktransformers.operators.models.DecoderModel"}}


@pytest.fixture
def model(checkpoint):
    return meta_model(checkpoint("deepseek_v3", num_hidden_layers=8)[0].config)


def devices_of(found, pattern):
    return [r.device for name, r in found.items() if re.search(pattern, name)]


@pytest.mark.parametrize("gpus", [0, 1, 2, 4, 8, 11])
def test_auto_spreads_layers_evenly(model, gpus):
    found = plan(model, {"devices": "auto", "rules": [LINEARS, DECODER]}, gpus=gpus)
    layers = devices_of(found, r"^model\.layers\.\d+$")
    assert layers == [f"cuda:{i * gpus // 8}" if gpus else "cpu" for i in range(8)]
    for i, device in enumerate(layers):
        assert set(devices_of(found, rf"^model\.layers\.{i}\.")) == {device}
    assert found["lm_head"].kwargs["prefill_device"] == found["model.norm"].device == layers[-1]
    assert found["model.embed_tokens"].device == found["model.rotary_emb"].device == found["model"].device == layers[0]
    changes = found["model"].kwargs["transfer_map"]
    assert changes[0] == layers[0]
    assert [changes[i] for i in sorted(changes)] == list(dict.fromkeys(layers))


def test_layers_live_where_the_mapping_says(model):
    spec = {"cuda:1": "0-2", "cpu": [3, "6-"], "cuda:0": "rest"}
    found = plan(model, {"devices": spec, "rules": [LINEARS, DECODER]}, gpus=2)
    layers = devices_of(found, r"^model\.layers\.\d+$")
    assert layers == ["cuda:1"] * 3 + ["cpu"] + ["cuda:0"] * 2 + ["cpu"] * 2
    assert found["model"].kwargs["transfer_map"] == {0: "cuda:1", 3: "cpu", 4: "cuda:0", 6: "cpu"}


def test_a_rule_s_own_device_and_default_device_win_over_the_layer_s(model):
    rules = [{**LINEARS, "replace": {"class": LINEAR, "kwargs": {"generate_device": "cpu"}, "device": "layer"}}]
    found = plan(model, {"devices": "auto", "rules": rules}, gpus=2, default_device="cuda:1")
    assert found["lm_head"].kwargs == {"generate_device": "cpu", "prefill_device": "cuda:1"}
    assert found["model.layers.0.input_layernorm"].device == "cuda:1"


def test_renamed_devices_count_as_gpus_that_rules_mean(model):
    found = plan(model, "MLA", devices={"cuda:0": "cpu", "cuda:1": "cpu"})
    assert set(devices_of(found, ".")) == {"cpu"}
    assert found["model"].kwargs["transfer_map"] == {0: "cpu", 4: "cpu"}


def test_variables_fill_texts_and_stand_for_values(model):
    rules = {
        "variables": {"part": "mlp", "op": LINEAR, "much": False},
        "rules": [
            {"match": {"name": r"\.${part}\.down_proj$"}, "replace": {"class": "${op}"}, "recursive": "${much}"},
        ],
    }
    rule = load_rules(rules)[0]
    assert rule.name.pattern == r"\.mlp\.down_proj$" and rule.recursive is False and rule.operator.__name__ in LINEAR


def test_expect_counts_the_modules_a_rule_takes(model):
    plan(model, [{**DECODER, "expect": 1}], default_device="cpu")
    rules = {"devices": "auto", "rules": [{**LINEARS, "expect": 3}]}
    with pytest.raises(RuleError, match=r"rule 1: expect: takes \d+ modules, expected 3. Correct"):
        plan(model, rules, gpus=0)
    taken = {"match": {"name": "^lm_head$"}, "replace": {"class": "default"}}
    first = {**LINEARS, "expect": 0}
    with pytest.raises(RuleError, match=r"takes 0 modules, expected 1; earlier rules \(1\) took 1"):
        plan(model, [{"match": {"trait": "linear"}, "replace": {"class": LINEAR}}, {**taken, "expect": 1}], gpus=0)
    with pytest.raises(RuleError, match=r"takes \d+ modules, expected 0"):
        plan(model, {"devices": "auto", "rules": [first]}, gpus=0)


MISTAKES = [
    ({"devices": "autoo"}, "devices: found 'autoo', expected 'auto' or a mapping"),
    ({"devices": {}}, "devices: found {}"),
    ({"devices": {"cuda:0": "a-b"}}, "cuda:0: 'a-b' names no layers; expected layers such as"),
    ({"devices": {"cuda:0": "4-2"}}, "cuda:0: '4-2' names no layers"),
    ({"devices": {"cuda:0": True}}, "names no layers"),
    ({"devices": {0: "0-7"}}, "devices: 0 is no device name"),
    ({"devices": {"cuda:0": "0-3"}}, "no device has layers 4, 5, 6, 7; name them, or write a device with 'rest'"),
    ({"devices": {"cuda:0": "0-8"}}, "layer 8 does not exist; the model has layers 0 to 7"),
    ({"devices": {"cuda:0": "0-9999"}}, "layer 9999 does not exist"),
    ({"devices": {"cuda:0": "0-4", "cpu": "4-"}}, "layer 4 is given to cuda:0 and to cpu; give it to one"),
    ({"devices": {"cuda:0": "rest", "cpu": "rest"}}, "'rest' is given to several devices"),
    ({"devices": {"cuda:0": "0-", "cpu": "rest"}}, "cpu: 'rest' is empty"),
    ({"devices": {"cuda:7": "0-"}}, "'cuda:7' does not exist on the machine planned for: GPUs are cuda:0 to cuda:1"),
    ({"device": {"cuda:0": "0-"}}, "unknown key 'device' (did you mean 'devices'?)"),
    ({"variables": {"a": [1]}}, "variables: expected a mapping from names to texts"),
    ({"variables": {"a": 1}}, "variable 'a' is used nowhere"),
    ({"rules": [{**LINEARS, "expect": "many"}]}, "expect: found 'many', expected how many modules"),
    ({"rules": [{**LINEARS, "replace": {"class": LINEAR, "device": 3}}]}, "replace.device: found a whole number"),
    ({"rules": [{**LINEARS, "replace": {"class": "${operator}"}}]}, "variable 'operator' unknown; known: none"),
    ({"devices": "auto", "rules": []}, "found nothing, expected a YAML list of rules"),
]


@pytest.mark.parametrize(("file", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_is_named(model, file, message):
    with pytest.raises(RuleError, match=re.escape(message)):
        plan(model, {"devices": "auto", "rules": [LINEARS], **file}, gpus=2)


def test_a_file_without_devices_has_no_layer_device(model):
    rules = [{"match": {"trait": "linear"}, "replace": {"class": LINEAR, "kwargs": {"generate_device": "layer"}}}]
    with pytest.raises(RuleError, match="no `devices:` say where layers live"):
        plan(model, rules, gpus=1)
    with pytest.raises(RuleError, match="unknown key 'device'"):
        plan(model, [LINEARS], gpus=1)


def test_lines_are_named_in_files_too(model, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "devices:\n  cuda:0: 0-3\nrules:\n- match: {trait: linear}\n  replace:\n    class: ${x}\n    device: layer\n"
    )
    with pytest.raises(RuleError, match=r"(?s): 2 problems.*two.yaml:6: variable 'x' unknown.*two.yaml:1: devices: no device"):
        plan(model, path, gpus=1)
    path.write_text(path.read_text().replace("0-3", "a-b").replace("${x}", LINEAR))
    with pytest.raises(RuleError) as caught:
        plan(model, path, gpus=1)
    assert [str(problem).partition(" names")[0] for problem in caught.value.problems] == [f"{path}:2: devices: cuda:0: 'a-b'"]


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [*NAMES, "Default"])
def test_several_gpus_played_by_the_cpu_compute_what_transformers_computes(checkpoint, name, gpus):
    family, overrides = MODELS.get(name, ("qwen3_moe", {}))
    reference, folder = checkpoint(family, **overrides)
    stand_ins = {f"cuda:{i}": "cpu" for i in range(gpus)}
    model = optimize_and_load(meta_model(reference.config), name, folder, devices=stand_ins, progress=False)
    _, layers = find_layers(model)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits, reference(ids).logits) < 1e-4
    decoder = next(module for module in model.modules() if hasattr(module, "transfer_map"))
    assert len(decoder.transfer_map) == min(gpus, len(layers))


def test_every_packaged_file_is_in_the_extended_form():
    for name in packaged_rules():
        assert load_rules(name).devices is not None, name
