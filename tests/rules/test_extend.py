"""Classic rule files in the extended form: every module is planned as before, with fewer rules and devices said once."""

import warnings

import pytest
import torch
import yaml

from ktransformers.cli.rules import gpus_named
from ktransformers.errors import RuleError
from ktransformers.rules.chain import chain_problems
from ktransformers.rules.extend import extend
from ktransformers.rules.plan import load_rules, plan
from tests.rules.test_plan import TUTORIAL, TUTORIAL_TWO_GPUS, v2_config
from tests.rules.test_published import STYLES, rule
from tests.tiny import meta_model, tiny_config

LINEAR = "linear.KTransformersLinear"
SEVERAL = [name for name, style in STYLES.items() if len(style.ranges) > 1]


@pytest.fixture
def extended(tmp_path):
    """Call with a model and a classic file's text or rules: (what the new file says, its text), proved equal here too."""

    def make(model, text, gpus=None):
        path = tmp_path / "old.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
        gpus = gpus_named(load_rules(path)) if gpus is None else gpus
        new = extend(model, path, gpus)
        check_equal(model, path, new, gpus)
        return yaml.safe_load(new), new

    with warnings.catch_warnings(action="ignore"):
        yield make


def same(device):
    """One name for one device."""
    device = torch.device(device)
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def told(replacement):
    """What a plan says of a module, but for the transfer map's entry of layer 0."""
    kwargs = {k: same(v) if k.endswith("device") and v is not None else v for k, v in replacement.kwargs.items()}
    transfers = {i: same(device) for i, device in (kwargs.pop("transfer_map", None) or {}).items() if i != 0}
    return replacement.operator, kwargs, transfers, same(replacement.device)


def check_equal(model, old_file, new_text, gpus):
    """Compare the plans here, by other means than the code under test does."""
    old, new = plan(model, old_file, gpus=gpus), plan(model, yaml.safe_load(new_text), gpus=gpus)
    assert old.keys() == new.keys()
    for name, replacement in old.items():
        module = model.get_submodule(name)
        holds = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if holds or replacement.operator or replacement.rule:
            assert told(new[name]) == told(replacement), name
    assert bool(chain_problems(model, new)) == bool(chain_problems(model, old))


@pytest.mark.parametrize("name", STYLES)
def test_a_file_of_the_published_style_is_rewritten_and_plans_the_same(extended, name):
    style = STYLES[name]
    old = style.rules()
    new, _ = extended(meta_model(tiny_config(style.family, **style.overrides)), old)
    if name not in SEVERAL:
        assert new["devices"] == {"cuda:0": "rest"} and len(new["rules"]) == len(old)
        return
    parts = 6 + bool(style.gate) - (style.attention is None)  # rotary, linear, block, experts, attention, all else
    assert len(new["rules"]) == len(old) - (len(style.ranges) - 1) * parts
    assert list(new["devices"]) == [device for _, device in style.ranges]
    patterns = [item["match"].get("name", "") for item in new["rules"]]
    assert sum(r"layers\.\d+" in pattern for pattern in patterns) == parts
    assert "transfer_map" not in str(new["rules"])


def test_what_is_written_names_devices_once(extended):
    style = STYLES["DeepSeek-V3 four GPUs"]
    new, text = extended(meta_model(tiny_config(style.family, **style.overrides)), style.rules())
    assert new["devices"] == {"cuda:0": "0-1", "cuda:1": "2-3", "cuda:2": "4-5", "cuda:3": "rest"}
    assert text.count("cuda:") == 4
    (experts,) = [item for item in new["rules"] if "KTransformersExperts" in item["replace"]["class"]]
    assert experts["match"]["name"] == r"^model\.layers\.\d+\.mlp\.experts$" and experts["recursive"] is False
    assert experts["replace"]["device"] == experts["replace"]["kwargs"]["out_device"] == "layer"
    assert experts["replace"]["kwargs"]["generate_device"] == "cpu"
    assert "prefill_device" not in experts["replace"]["kwargs"]


@pytest.mark.parametrize(("text", "layers", "rules"), [(TUTORIAL, 3, 7), (TUTORIAL_TWO_GPUS, 60, 3)])
def test_the_tutorials_files(extended, text, layers, rules):
    new, _ = extended(meta_model(v2_config(layers)), text)
    assert len(new["rules"]) == rules and new["devices"] == {"cuda:0": "rest"}
    if layers == 60:  # the file moves the hidden state, and leaves all but experts where they are: so does the new one
        assert new["rules"][0]["replace"]["kwargs"]["transfer_map"] == {30: "cuda:1"}


@pytest.fixture(scope="module")
def model():
    return meta_model(tiny_config("deepseek_v3", num_hidden_layers=6))


def placed(layers, device, what="default", name="", **kwargs):
    return rule(what, rf"^model\.layers\.{layers}\.{name}", generate_device=device, **kwargs)


def linears(layers, device, **kwargs):
    return placed(layers, device, LINEAR, r"self_attn\.o_proj$", prefill_device=device, **kwargs)


def test_rules_are_merged_only_where_the_plan_stays(extended, model):
    """The rule for layers 3 to 5 comes behind one that takes them all: merged into the first it would win."""
    rules = [linears("[0-2]", "cuda:0"), rule("default", r"self_attn\.o_proj$", generate_device="cuda:0")]
    rules += [linears("([3-5])", "cuda:1"), placed("[0-2]", "cuda:0"), placed("([3-5])", "cuda:1")]
    new, _ = extended(model, rules)
    assert [item["match"]["name"] for item in new["rules"]][:4] == [
        r"^model\.layers\.[0-2]\.self_attn\.o_proj$", r"self_attn\.o_proj$",
        r"^model\.layers\.([3-5])\.self_attn\.o_proj$", r"^model\.layers\.\d+\.",
    ]  # fmt: skip


def test_rules_that_differ_in_more_than_layers_stay_apart(extended, model):
    rules = [linears("[0-2]", "cuda:0", generate_op="KLinearTorch"), linears("[3-5]", "cuda:1"),
             placed("[0-2]", "cuda:0"), placed("[3-5]", "cuda:1")]  # fmt: skip
    new, _ = extended(model, rules)
    assert len(new["rules"]) == 4 and new["rules"][2]["match"]["name"] == r"^model\.layers\.\d+\."


def test_modules_that_no_rule_names_stay_where_they_were(extended, model):
    """The old default is cuda:0; the new one would be the layer's, and the last layer's after the layers."""
    new, _ = extended(model, [placed("[0-2]", "cuda:0", name="mlp"), placed("[3-5]", "cuda:1", name="mlp"),
                              placed("[0-2]", "cuda:0", name="self_attn"), placed("[3-5]", "cuda:1", name="self_attn")])  # fmt: skip
    assert new["devices"] == {"cuda:0": "0-2", "cuda:1": "rest"}
    last = new["rules"][-1]
    assert last["replace"] == {"class": "default", "device": "cuda:0"}
    assert r"model\.norm" in last["match"]["name"] and r"model\.layers\.\d+\.input_layernorm" in last["match"]["name"]


def test_a_prefill_device_that_was_never_given_stays_the_default(extended, model):
    """An operator without prefill_device prefills on cuda:0, wherever its layer lives."""
    rules = [placed(layers, device, LINEAR, r"self_attn\.o_proj$") for layers, device in (("[0-2]", "cuda:0"), ("[3-5]", "cuda:1"))]
    new, _ = extended(model, [*rules, placed("[0-2]", "cuda:0"), placed("[3-5]", "cuda:1")])
    assert new["rules"][0]["replace"]["kwargs"] == {"prefill_device": "cuda:0"}
    assert new["rules"][0]["replace"]["device"] == "layer"


def test_a_prefill_device_beside_a_generate_device_that_stays_is_written_too(extended, model):
    """For "default" the prefill device would be the generate device if it were left out."""
    rules = [placed("[0-9]", "cpu", name="mlp$", prefill_device="cuda:0"), placed("[0-9]", "cuda:0")]
    new, _ = extended(model, rules)
    kwargs = {"generate_device": "cpu", "prefill_device": "layer"}
    assert new["rules"][0]["replace"] == {"class": "default", "kwargs": kwargs}


def test_layers_that_go_back_and_single_layers(extended, model):
    new, _ = extended(model, [placed("[05]", "cuda:1"), placed("[1-4]", "cuda:0")])
    assert new["devices"] == {"cuda:1": "0,5", "cuda:0": "1-4"}
    new, _ = extended(model, [placed("3", "cuda:1"), placed("[0-24-5]", "cuda:0")])
    assert new["devices"] == {"cuda:0": "0-2,4-5", "cuda:1": 3}


def test_expected_numbers_of_merged_rules_add_up(extended, model):
    rules = [{**linears("[01]", "cuda:0"), "expect": 2}, {**linears("[2-5]", "cuda:1"), "expect": 4}]
    new, _ = extended(model, [*rules, placed("[01]", "cuda:0"), placed("[2-5]", "cuda:1")])
    assert new["rules"][0]["expect"] == 6


def test_a_transfer_map_that_says_something_else_is_kept(extended, model):
    decoder = rule("models.DecoderModel", "^model$", transfer_map={2: "cuda:1"})
    new, _ = extended(model, [decoder, placed("[0-2]", "cuda:0"), placed("[3-5]", "cuda:1")])
    assert new["rules"][0]["replace"]["kwargs"]["transfer_map"] == {2: "cuda:1"}
    del decoder["replace"]["kwargs"]["transfer_map"]
    new, _ = extended(model, [decoder, placed("[0-2]", "cuda:0"), placed("[3-5]", "cuda:1")])
    assert new["rules"][0]["replace"]["kwargs"]["transfer_map"] == {}


def test_a_decoder_that_looks_where_a_layer_s_first_weight_is_still_does(extended, model):
    """With an entry for layer 0 the input of layer 2 would stay on cuda:0, instead of going to its first projection, on the CPU."""
    rules = [rule("models.DecoderModel", "^model$"), rule("default", r"\.2\.self_attn\.q_a_proj$", generate_device="cpu")]
    new, _ = extended(model, [*rules, placed("[0-9]", "cuda:0")])
    assert new["rules"][0]["replace"]["kwargs"]["transfer_map"] == {}
    new, _ = extended(model, [rules[0], placed("[0-9]", "cuda:0")])
    assert "kwargs" not in new["rules"][0]["replace"]


def test_a_file_that_names_no_gpu_still_works_without_one_and_with_one(extended, model):
    rules = [rule(LINEAR, r"self_attn\.o_proj$"), rule("experts.KTransformersExperts", r"mlp\.experts$", generate_device="cpu")]
    new, text = extended(model, rules, gpus=0)
    assert new["devices"] == "auto"
    old = [{"match": {"name": ".+"}, "replace": {"class": "default"}}]
    assert {r.device for r in plan(model, yaml.safe_load(text), gpus=0).values()} == {"cpu"}
    assert extended(model, old, gpus=0)[0]["devices"] == "auto"


def test_comments_at_the_top_are_kept(extended, model):
    body = yaml.safe_dump([placed(".*", "cuda:0")])
    _, text = extended(model, f"# Mine.\n\n# Tested in May.\n---\n# of the first rule\n{body}# the end\n")
    assert text.startswith("# Mine.\n\n# Tested in May.\n# of the first rule\ndevices:\n") and "the end" not in text


def test_a_file_in_the_extended_form_is_told_of(model, tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text("rules:\n- match: {name: '^lm_head$'}\n  replace: {class: default}\n")
    with pytest.raises(RuleError, match="new.yaml: is in the extended form already, but has no `devices:`"):
        extend(model, path, 1)
    with pytest.raises(RuleError, match="MLA.yaml: is in the extended form already. There"):
        extend(model, "MLA", 1)


def test_where_no_file_would_be_equal_the_error_names_the_module(model, tmp_path, monkeypatch):
    from ktransformers.rules import extend as rewriting

    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump([linears("[0-2]", "cuda:0"), linears("[3-5]", "cuda:1")]))
    monkeypatch.setattr(rewriting._Rewriting, "_replace", lambda self, piece, meant: {**piece.item["replace"], "kwargs": {}})
    message = r"old.yaml: cannot be in the extended form: model.layers.3.self_attn.o_proj would be .* Keep the file"
    with pytest.raises(RuleError, match=message):
        extend(model, path, 2)


def test_a_merge_that_would_look_below_what_another_rule_hides_is_left_out(extended, model):
    """Merged, rule 1 would take the attention of all layers first, and not stop there."""
    rules = [
        rule("default", r"^model\.layers\.0\.self_attn", generate_device="cuda:0"),
        rule("default", r"^model\.layers\.(1|2)\.self_attn$", recursive=False, generate_device="cuda:1"),
        rule("default", r"^model\.layers\.[3-5]\.self_attn", generate_device="cuda:0"),
    ]
    extended(model, rules)


def test_two_names_of_one_device_are_one(extended, model):
    rules = [rule("default", "norm", generate_device="cuda", prefill_device="cuda")]
    extended(model, rules)
    assert plan(model, rules, gpus=1)["model"].operator is None
