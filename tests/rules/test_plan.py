"""Rules mean what upstream's mean, and every mistake in them is found before anything is touched, all at once."""

import re
import sys
import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, Qwen2MoeConfig

from ktransformers.errors import RuleError
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.linear import KTransformersLinear, LinearTorchInject
from ktransformers.rules.plan import load_rules, packaged_rules, plan
from ktransformers.rules.table import plan_rows

LINEAR = "ktransformers.operators.linear.KTransformersLinear"
EXPERTS = "ktransformers.operators.experts.KTransformersExperts"
CPU = {"cuda": "cpu"}


def meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def model():
    """A DeepSeek-V3 with one dense and two MoE layers, on the meta device."""
    return meta(
        DeepseekV3Config(
            vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        )
    )  # fmt: skip


def rule(name=None, cls=None, operator="default", recursive=None, **kwargs):
    match = {key: value for key, value in (("name", name), ("class", cls)) if value is not None}
    made = {"match": match, "replace": {"class": operator, "kwargs": kwargs}}
    return made if recursive is None else {**made, "recursive": recursive}


def operators(replacements):
    return {key: r.operator.__name__ for key, r in replacements.items() if r.operator}


# --- semantics ----------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_wins_and_nothing_is_merged(model):
    found = plan(model, [
        rule(r"layers\.1\.mlp\.shared_experts", "torch.nn.Linear", LINEAR, generate_op="KLinearTorch"),
        rule(r"shared_experts", generate_device="cpu", prefill_device="cpu"),
    ])  # fmt: skip
    taken = operators(found)
    assert sorted(taken) == [f"model.layers.1.mlp.shared_experts.{p}_proj" for p in ("down", "gate", "up")]
    assert found["model.layers.1.mlp.shared_experts.up_proj"].rule.number == 1
    assert found["model.layers.2.mlp.shared_experts.up_proj"].rule.number == 2
    assert found["model.layers.0.mlp.up_proj"].rule is None


def test_names_are_searched_not_anchored_and_both_conditions_mean_and(model):
    found = plan(model, [rule("kv_a", "torch.nn.Linear", LINEAR)])
    assert sorted(operators(found)) == [f"model.layers.{i}.self_attn.kv_a_proj_with_mqa" for i in range(3)]


def test_class_is_isinstance_so_subclasses_match():
    class Special(nn.Linear):
        pass

    net = nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.ReLU())
    found = plan(net, [rule(cls="torch.nn.Linear", operator=LINEAR, generate_device="cpu")])
    assert sorted(operators(found)) == ["0", "1"]


def test_recursive_false_stops_below_a_match_and_true_does_not(model):
    attention = rule(r"self_attn$", recursive=False)
    linear = rule("", "torch.nn.Linear", LINEAR)
    stopped = operators(plan(model, [attention, linear]))
    assert not any("self_attn" in key for key in stopped) and "lm_head" in stopped
    through = operators(plan(model, [rule(r"self_attn$"), linear]))
    assert "model.layers.0.self_attn.o_proj" in through


def test_a_recursive_false_match_of_the_root_hides_the_whole_model(model):
    found_rules = [rule("", recursive=False), rule("", "torch.nn.Linear", LINEAR)]
    with pytest.raises(RuleError, match="below a module that an earlier rule took"):
        plan(model, found_rules)


def test_devices_of_unnamed_modules_are_the_default(model):
    found = plan(model, [rule("^lm_head$", generate_device="cpu")], default_device="cpu")
    assert found["model.norm"].kwargs == {"generate_device": "cpu", "prefill_device": "cpu"}
    assert set(found) == {name for name, _ in model.named_modules() if name}


def test_plan_goes_depth_first_and_leaves_the_model_alone(model):
    before = [(name, type(module)) for name, module in model.named_modules()]
    found = plan(model, [rule(r"\.mlp\.experts$", operator=EXPERTS, generate_device="cpu")])
    assert list(found)[:3] == ["model", "model.embed_tokens", "model.layers"]
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_traits_find_modules_by_structure(model):
    found = plan(model, [{"match": {"trait": "experts"}, "replace": {"class": EXPERTS}}])
    assert sorted(operators(found)) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


# --- mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES = [
    (rule("lm_head") | {"recursve": True}, r"unknown key 'recursve' \(did you mean 'recursive'\?\)"),
    ({"match": {"nmae": "lm_head"}, "replace": {"class": "default"}}, r"unknown key 'nmae' \(did you mean 'name'\?\)"),
    ({"match": {}, "replace": {"class": "default"}}, r"match: is empty"),
    (rule("lm_head") | {"kwargs": {"generate_device": "cpu"}}, r"'kwargs' belongs under replace; known here: match, replace"),
    (rule("lm_head") | {"name": "x"}, r"'name' belongs under match"),
    (rule("lm_head") | {"class": "default"}, r"'class' belongs under match or replace"),
    (rule("lm_head") | {"generate_device": "cpu"}, r"'generate_device' belongs under replace, in its kwargs"),
    ({"match": {"name": "lm_head"}, "replace": {"class": "default", "recursive": False}}, r"replace: 'recursive' belongs one level up"),
    ({"match": {"name": "lm_head"}, "replace": {"class": "default", "generate_device": "cpu"}}, r"replace: 'generate_device' belongs under replace, in its kwargs"),
    ({"match": {"name": "lm_head"}}, r"has no 'replace'"),
    ({"replace": {"class": "default"}}, r"has no 'match'"),
    ({"match": "lm_head", "replace": {"class": "default"}}, r"match: found text, expected a mapping"),
    ({"match": {"name": "lm_head"}, "replace": {"class": "default", "device": "cpu"}}, r"unknown key 'device'"),
    (rule("lm_head", recursive="False"), r"recursive: found 'False', expected true or false"),
    (rule("lm_head("), r"'lm_head\(' is no regular expression"),
    (rule(3), r"match.name: found a whole number"),
    (rule("lm_head", "torch.nn.Linaer"), r"no class 'Linaer' \(did you mean 'Linear'\?\)"),
    (rule(cls="Linear"), r"expected a dotted path"),
    (
        rule("lm_head", operator="ktransformers.operators.linear.KTransformerLinear"),
        r"did you mean 'KTransformersLinear'",
    ),
    (rule("lm_head", operator="ktransformers.operators.liner.KTransformersLinear"), r"did you mean 'linear'"),
    (rule("lm_head", operator="torch.nn.Linear"), r"torch.nn.Linear is no operator"),
    (
        rule("lm_head", operator="subprocess_helper.Popen"),
        r"outside torch, transformers, ktransformers.*KT_RULE_MODULES",
    ),
    (
        rule("lm_head", operator=LINEAR, generate_opp="KLinearTorch"),
        r"kwarg 'generate_opp' unknown .*did you mean 'generate_op'",
    ),
    (rule("lm_head", operator=LINEAR, generate_op=3), r"kwarg generate_op: 3 is a whole number, expected"),
    (
        rule("lm_head", operator=LINEAR, generate_op="KLinearTroch"),
        r"'KLinearTroch' unknown \(did you mean 'KLinearTorch'\?\)",
    ),
    (rule("lm_head", generate_op="KLinearTorch"), r"kwarg 'generate_op' has no meaning for class 'default'"),
    (rule("lm_head", generate_device="cuda:0"), r"no cuda device.*devices=\{'cuda': 'cpu'\}"),
    (rule("lm_head", generate_device="gpu"), r"'gpu' is no device name"),
    (rule("lm_head", generate_device="meta"), r"'meta' holds no data"),
    (rule("lm_heads"), r"matches no module of DeepseekV3ForCausalLM \(name 'lm_heads' matches 0\)"),
    (
        rule("lm_head", "torch.nn.Embedding"),
        r"matches no module .*name 'lm_head' matches 1, class .*Embedding matches 1",
    ),
    ({"match": {"trait": "expert"}, "replace": {"class": "default"}}, r"'expert' unknown \(did you mean 'experts'\?\)"),
    ("lm_head", r"found text, expected a mapping with match and replace"),
    ({"match": {"trait": ["experts"]}, "replace": {"class": "default"}}, r"\['experts'\] unknown"),
    ({"match": {"trait": None}, "replace": {"class": "default"}}, r"None unknown"),
    ({"match": {"class": None}, "replace": {"class": "default"}}, r"match.class: found null"),
    ({"match": {"name": None}, "replace": {"class": "default"}}, r"match.name: found null"),
    (rule("lm_head", operator=None), r"replace.class: found null"),
    (rule(b"lm_head"), r"match.name: found bytes"),
    (rule("a{99999999999999}"), r"no regular expression"),
    (rule("(" * 5000), r"no regular expression"),
    (rule("lm_head", "typing.Any"), r"outside torch|no class 'Any'"),
    (rule("lm_head", "torch..x"), r"expected a dotted path"),
    (
        rule("lm_head", operator="ktransformers.operators.linear.KLinearTorch"),
        r"is no operator.*generate_op of KTransformersLinear",
    ),
    (rule(".*", recursive=False), r"matches the model itself first"),
]


@pytest.mark.parametrize(("bad", "message"), MISTAKES)
def test_a_mistake_is_named(model, bad, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuleError, match=message):
        plan(model, [bad])


def test_all_mistakes_of_a_file_are_listed_with_their_lines(model, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "- match:\n    name: '('\n  replace:\n    class: default\n"
        "- match:\n    name: lm_head\n  replce:\n    class: default\n"
        "- match:\n    class: torch.nn.Linaer\n  replace:\n    class: default\n"
    )
    with pytest.raises(RuleError) as caught:
        plan(model, path)
    headline, *listed = str(caught.value).splitlines()
    assert headline.startswith(f"{path} for DeepseekV3ForCausalLM: 4 problems")
    at = ["2 (rule 1): match.name", "7 (rule 2): unknown key 'replce'", "5 (rule 2): has no 'replace'", "10 (rule 3): match.class"]
    assert [text.startswith(f"  - {path}:{place}") for text, place in zip(listed, at, strict=True)] == [True] * 4, listed


KWARGS_LINE = "- match:\n    name: {name}\n  replace:\n    class: {cls}\n    kwargs:\n      generate_device: {device}\n      generate_op: {op}\n  expect: {expect}\n"


@pytest.mark.parametrize(
    ("wrong", "line", "message"),
    [
        ({"name": "lm_heat"}, 2, "matches no module"),
        ({"cls": "torch.nn.Linear"}, 4, "is no operator"),
        ({"cls": EXPERTS, "op": "KExpertsTorch"}, 4, "expected an experts module"),
        ({"device": "gpu"}, 6, "'gpu' is no device name"),
        ({"device": 3}, 6, "3 is a whole number, expected"),
        ({"op": "KLinearTroch"}, 7, "'KLinearTroch' unknown"),
        ({"op": 3}, 7, "3 is a whole number, expected"),
        ({"expect": 2}, 8, "takes 1 modules, expected 2"),
    ],
)
def test_one_mistake_is_one_line_that_names_the_line_of_its_key(model, tmp_path, wrong, line, message):
    right = {"name": "lm_head", "cls": LINEAR, "device": "cpu", "op": "KLinearTorch", "expect": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(KWARGS_LINE.format(**right))
    plan(model, path)
    path.write_text(KWARGS_LINE.format(**right | ({"expect": "null"} if "name" in wrong else {}) | wrong))
    with pytest.raises(RuleError) as caught:
        plan(model, path)
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"{path}:{line} (rule 1): ") and message in str(problem)


def test_malformed_rules_and_rules_that_match_nothing_are_listed_together(model):
    bad = [rule("("), rule("no_such"), rule("nor_this", operator=LINEAR, generate_opp=1), rule("lm_head")]
    with pytest.raises(RuleError) as caught:
        plan(model, bad, default_device="cpu")
    text = str(caught.value)
    assert "4 problems" in text and text.count("matches no module") == 2 and "no regular expression" in text


def test_a_class_is_suggested_only_for_one_that_no_module_is(model):
    with pytest.raises(RuleError) as error:
        plan(model, [rule("^lm_heat", "torch.nn.Linear"), rule(cls="transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2RMSNorm")])
    name, cls = str(error.value).splitlines()[1:]
    assert "matches 0, class torch.nn.modules.linear.Linear matches" in name and "did you mean" not in name
    assert "(did you mean 'transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm'?)" in cls


def test_rules_that_do_not_fit_are_listed_together(model):
    with pytest.raises(RuleError) as caught:
        plan(
            model,
            [rule("no_such"), rule("lm_head", generate_device="cuda:9"), rule("nothing_either")],
            default_device="cpu",
        )
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- match: [", "not valid YAML"),
        ("match:\n  name: a\n", "found a mapping, expected a YAML list"),
        ("", "found nothing"),
        ("- match:\n    name: a\n    name: b\n  replace: {}\n", "bad.yaml:3: .*'name' is given twice"),
        ("\x00\x01", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_rule_list_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RuleError, match=message):
        load_rules(path)


NASTY = ["? [a] : b\n", "- {? {a: b} : c}\n", "- name: 2001-13-45\n", "- match: {name: !!int abc}\n", "- match: {name: !!int ''}\n",
         "- match: {name: !!bool maybe}\n", "[" * 3000, "- match: {name: !!binary aGVsbG8=}\n  replace: {class: default}\n",
         "- match: {name: " + "9" * 5000 + "}\n", "- &a [*a]\n", "- !!python/object:os.system {}\n"]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=lambda text: text[:24].strip())
def test_nasty_yaml_is_a_rule_error(model, tmp_path, text):
    path = tmp_path / "nasty.yaml"
    path.write_text(text)
    with pytest.raises(RuleError):
        plan(model, path)


def test_merge_keys_work_and_repeated_keys_do_not(model, tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "- match: {name: ^lm_head$}\n  replace:\n    class: default\n    kwargs: &cpu {generate_device: cpu}\n"
        "- match: {name: embed_tokens}\n  replace:\n    class: default\n    kwargs: {<<: *cpu, prefill_device: cpu}\n"
    )
    assert plan(model, path)["model.embed_tokens"].kwargs == {"generate_device": "cpu", "prefill_device": "cpu"}


def test_rules_of_several_files_are_renumbered(model, tmp_path):
    for name, text in (("a", "lm_head"), ("b", "no_such_module")):
        (tmp_path / f"{name}.yaml").write_text(f"- match: {{name: {text}}}\n  replace: {{class: default}}\n")
    with pytest.raises(RuleError, match=r"b.yaml:1 \(rule 2\): matches no module"):
        plan(model, [*load_rules(tmp_path / "a.yaml"), *load_rules(tmp_path / "b.yaml")], default_device="cpu")


def test_a_missing_file_suggests_a_packaged_one(tmp_path):
    with pytest.raises(RuleError, match=r"did you mean 'DeepSeek-V3'"):
        load_rules("DeepSeekV3.yaml")
    with pytest.raises(RuleError, match="is a folder"):
        load_rules(tmp_path)


@pytest.mark.parametrize("name", ["deepseek-v3", "DEEPSEEK-V3.yaml", "moe", "Qwen3-moe"])
def test_packaged_rules_are_found_in_whatever_case(name):
    assert load_rules(name).label in {"MLA.yaml", "MoE.yaml"}


FOLLOWS = {
    "rules after one that is not understood take its modules": [rule(r"mlp\.gate$(", operator="ktransformers.operators.gate.KMoEGate"),
        rule(r"\.(gate|up)_proj$|mlp\.gate$", operator=LINEAR, generate_op="KLinearTorch"), rule("lm_head") | {"expect": 2}],
    "an operator that is not found hides nothing": [rule(r"self_attn$", operator="ktransformers.operators.attention.KDepseekV2Attention"), rule("", "torch.nn.Linear") | {"expect": 2}],
    "a kwarg of the wrong type is asked no more": [rule(r"^lm_head$", operator=LINEAR, generate_device=5)],
    "an operator with an unknown kwarg is asked no more": [rule(r"self_attn$", operator=LINEAR, generate_opp="KLinearTorch")],
    "kwargs at the wrong depth are those of no operator": [{"match": {"name": "^model$"}, "kwargs": {"transfer_map": {9: "cpu"}}, "replace": {"class": "default"}}],
}  # fmt: skip


@pytest.mark.parametrize("what", FOLLOWS)
def test_what_follows_from_another_mistake_is_not_listed(model, what):
    with pytest.raises(RuleError) as caught:
        plan(model, FOLLOWS[what], default_device="cpu")
    assert len(caught.value.problems) == 1, caught.value


def test_thousands_of_rules_take_about_a_second(model):
    many = [rule(rf"no_such_module_{i}$", "torch.nn.Linear", LINEAR, generate_op="KLinearTorch") for i in range(5000)]
    before = time.process_time()
    with pytest.raises(RuleError, match="5000 problems"):
        plan(model, many, default_device="cpu")
    assert time.process_time() - before < 4


def test_a_rule_whose_matches_are_all_taken_warns(model):
    with pytest.warns(UserWarning, match="rule 2: never wins: all 1 modules it matches are taken by earlier rules"):
        plan(model, [rule("lm_head"), rule("^lm_head$")])


def test_a_class_of_the_users_own_program_needs_no_permission(model):
    found = plan(model, [rule("lm_head", operator=f"{__name__}.MyLinear", my_param=2)])
    assert found["lm_head"].operator is MyLinear


@pytest.mark.parametrize("there", ["rules", "here"])
def test_a_listed_module_may_lie_beside_the_rules_or_in_the_current_folder(model, tmp_path, monkeypatch, there):
    for folder in ("rules", "here"):
        (tmp_path / folder).mkdir()
    name = f"my_ops_in_{there}"
    (tmp_path / there / f"{name}_sizes.py").write_text("TWO = 2\n")
    (tmp_path / there / f"{name}.py").write_text(
        f"from ktransformers.operators.base_operator import BaseInjectedModule\nfrom {name}_sizes import TWO\n\n\nclass Mine(BaseInjectedModule):\n    two = TWO\n"
    )
    path = tmp_path / "rules" / "mine.yaml"
    path.write_text(f"- match: {{name: lm_head}}\n  replace: {{class: {name}.Mine}}\n")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RuleError, match=f"KT_RULE_MODULES={name}"):
        plan(model, path, default_device="cpu")
    monkeypatch.setenv("KT_RULE_MODULES", name)
    before = list(sys.path)
    assert plan(model, path, default_device="cpu")["lm_head"].operator.two == 2
    assert sys.path == before
    monkeypatch.setenv("KT_RULE_MODULES", "no_such_ops")
    path.write_text("- match: {name: lm_head}\n  replace: {class: no_such_ops.Mine}\n")
    with pytest.raises(RuleError, match=rf"No module named 'no_such_ops' \(looked in {tmp_path}/rules, {tmp_path}/here too\). Install it"):
        plan(model, path, default_device="cpu")


def test_a_listed_module_that_cannot_be_imported_is_said_whatever_the_rules_name(model, tmp_path, monkeypatch):
    (tmp_path / "my_other_ops.py").touch()
    path = tmp_path / "mine.yaml"
    path.write_text("- match: {name: lm_head}\n  replace: {class: default}\n")
    monkeypatch.setenv("KT_RULE_MODULES", "yaml,my_othre_ops")
    with pytest.warns(UserWarning, match=r"KT_RULE_MODULES: 'my_othre_ops' \(did you mean 'my_other_ops'\?\) cannot be imported"):
        plan(model, path, default_device="cpu")
    path.write_text("- match: {name: lm_head}\n  replace: {class: my_other_ops.Mine}\n")
    with pytest.raises(RuleError, match=r"my_othre_ops' \(did you mean.*Install it, correct the name, or unset KT_RULE_MODULES"):
        plan(model, path, default_device="cpu")
    monkeypatch.setenv("KT_RULE_MODULES", "yaml")
    with pytest.raises(RuleError, match="set KT_RULE_MODULES=yaml,my_other_ops"):
        plan(model, path, default_device="cpu")


class MyLinear(BaseInjectedModule):
    def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", my_param: int = 0, **kwargs):
        super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)


# --- published files ----------------------------------------------------------------------------------------------------


def test_devices_can_be_renamed_everywhere(model):
    rules = [rule("lm_head", operator=LINEAR, generate_device="cuda:1", prefill_device="cuda"), rule("^model$", None,
             "ktransformers.operators.models.KDeepseekV2Model", transfer_map={2: "cuda:1"})]  # fmt: skip
    found = plan(model, rules, devices=CPU)
    assert found["lm_head"].kwargs["generate_device"] == "cpu" == found["lm_head"].kwargs["prefill_device"]
    assert found["model"].kwargs["transfer_map"] == {2: "cpu"}


# The rules of the injection tutorial, as its readers have them (DeepSeek-V2, one GPU).
TUTORIAL = r"""
- match:
    name: "^model\\.layers\\..*\\.self_attn$"
  replace:
    class: ktransformers.operators.attention.KDeepseekV2Attention
- match:
    name: "^model\\.layers\\..*\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op: "MLPCPUExperts"
      out_device: "cuda"
  recursive: False
- match:
    class: ktransformers.models.modeling_deepseek.DeepseekV2MoE
  replace:
    class: ktransformers.operators.experts.KDeepseekV2MoE
- match:
    name: "^model\\.layers\\.(?!.*self_attn).*$"
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs:
      generate_device: "cuda"
      generate_op: "QuantizedLinearMarlin"
- match:
    class: ktransformers.models.modeling_deepseek.DeepseekV2YarnRotaryEmbedding
  replace:
    class: ktransformers.operators.RoPE.YarnRotaryEmbedding
- match:
    name: "^model\\.layers\\..*\\.|^lm_head"
  replace:
    class: "default"
    kwargs:
      generate_device: "cuda"
- match:
    name: "^model.embed_tokens"
  replace:
    class: "default"
    kwargs:
      generate_device: "cpu"
"""

# The tutorial's rules for two GPUs and 60 layers.
TUTORIAL_TWO_GPUS = r"""
- match:
    name: "^model$"
  replace:
    class: "ktransformers.operators.models.KDeepseekV2Model"
    kwargs:
      transfer_map:
        30: "cuda:1"
- match:
    name: "^model\\.layers\\.(0|[1-9]|[12][0-9])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      out_device: "cuda:0"
  recursive: False
- match:
    name: "^model\\.layers\\.([345][0-9])\\.mlp\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cpu"
      generate_op: "KExpertsCPU"
      out_device: "cuda:1"
  recursive: False
"""


def v2_config(layers):
    return DeepseekV2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip


def test_the_tutorials_rules_plan_as_printed(tmp_path):
    path = tmp_path / "tutorial.yaml"
    path.write_text(TUTORIAL)
    taken = operators(plan(meta(v2_config(3)), path, devices=CPU))
    assert taken["model.layers.0.self_attn"] == "KDeepseekV2Attention"
    assert (
        taken["model.layers.1.mlp"] == "KDeepseekV2MoE"
        and taken["model.layers.1.mlp.experts"] == "KTransformersExperts"
    )
    assert taken["model.layers.1.mlp.shared_experts.up_proj"] == "KTransformersLinear"
    assert taken["model.rotary_emb"] == "YarnRotaryEmbedding"
    assert not any(re.search(r"self_attn\.", key) for key in taken)


def test_the_tutorials_two_gpu_rules_plan_as_printed(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(TUTORIAL_TWO_GPUS)
    found = plan(meta(v2_config(60)), path, devices=CPU)
    assert (
        found["model.layers.29.mlp.experts"].rule.number == 2 and found["model.layers.30.mlp.experts"].rule.number == 3
    )
    assert operators(found)["model"] == "KDeepseekV2Model"


def test_the_tutorials_own_operator_plans_with_its_parameter(model):
    taken = plan(model, [rule(r"^model\.layers\..*$", "torch.nn.Linear",
                 "ktransformers.operators.linear.LinearTorchInject", generate_device="cuda", my_param=True)], devices=CPU)  # fmt: skip
    assert taken["model.layers.0.self_attn.o_proj"].operator is LinearTorchInject


def test_every_packaged_file_parses_and_its_family_plans(model):
    families = {"DeepSeek-V3": model, "DeepSeek-V2": meta(v2_config(3)), "Qwen2-MoE": meta(qwen2_config())}
    for name in packaged_rules():
        assert load_rules(name)
        if name in families:
            assert "KTransformersExperts" in operators(plan(families[name], name, devices=CPU)).values()


def qwen2_config():
    return Qwen2MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


# --- the table ----------------------------------------------------------------------------------------------------------


def test_the_plan_table_groups_layers_by_pattern(model):
    found = plan(
        model,
        [rule(r"\.mlp\.experts$", operator=EXPERTS, generate_device="cpu", recursive=False)],
        default_device="cpu",
    )
    rows = {row["pattern"]: row for row in plan_rows(model, found)}
    experts = rows["model.layers.*.mlp.experts"]
    assert experts["count"] == 2 and experts["rule"] == "1" and experts["device"].startswith("cpu")
    assert rows["model.layers.*.input_layernorm"]["count"] == 3


def test_kwargs_of_a_wrapped_operator_reach_through_its_bases():
    from ktransformers.rules import classes

    assert {"generate_device", "prefill_device", "my_param"} <= set(classes.parameters(MyLinear))
    assert "orig_module" not in classes.parameters(KTransformersLinear)
