"""`kt rules`: mistakes with their line and the exit code, reasons, and files that are written only where they may be."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from ktransformers import cli
from ktransformers.cli import rules as command
from ktransformers.rules.plan import load_rules
from tests.tiny import tiny_config

TWO_GPUS = r"""# Two GPUs for a model of six layers.
# Made by hand.

- match:
    name: ^model\.layers\.([0-2])\.(?!mlp\.gate$)
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: "cuda:0", prefill_device: "cuda:0"}
- match:
    name: ^model\.layers\.([3-5])\.(?!mlp\.gate$)
    class: torch.nn.Linear
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: "cuda:1", prefill_device: "cuda:1"}
- match: {trait: experts}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {generate_device: cpu, prefill_device: cpu}
  recursive: False
- match: {name: ^model$}
  replace:
    class: ktransformers.operators.models.DecoderModel
    kwargs: {transfer_map: {3: "cuda:1"}}
- match: {name: '^model\.layers\.([0-2])(\.|$)'}
  replace: {class: default, kwargs: {generate_device: "cuda:0"}}
- match: {name: '^model\.layers\.([3-5])(\.|$)'}
  replace: {class: default, kwargs: {generate_device: "cuda:1"}}
- match: {name: '^(model\.norm|lm_head)$'}
  replace: {class: default, kwargs: {generate_device: "cuda:1"}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the config of a tiny DeepSeek-V3 of six layers: all that a check needs."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config("deepseek_v3", num_hidden_layers=6).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def two(tmp_path):
    """The path of the file for two GPUs; call with (old, new) texts to plant a mistake in it."""

    def write(*changes):
        text = TWO_GPUS
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new, 1)
        path = tmp_path / "two.yaml"
        path.write_text(text)
        return str(path)

    return write


def kt(*arguments, code=0):
    """What `kt rules ARGUMENTS` prints, on both streams; its exit code has to be `code`."""
    ran = CliRunner().invoke(cli.app, ["rules", *arguments])
    assert ran.exit_code == code, ran.output + repr(ran.exception)
    return ran.output


def line(text):
    """The line of the file above on which `text` first is."""
    return TWO_GPUS[: TWO_GPUS.index(text)].count("\n") + 1


# --- check --------------------------------------------------------------------------------------------------


def test_a_file_without_mistakes_is_said_to_fit(model, two):
    assert kt("check", two(), model).startswith(
        "two.yaml fits DeepseekV3ForCausalLM on 2 GPUs (--gpus N for another): 7 rules, "
    )


def test_packaged_rules_fit_a_known_model():
    out = kt("check", "Mixtral", "mixtral-8x7b", "--strict")
    assert re.fullmatch(r"MoE\.yaml fits MixtralForCausalLM on 1 GPU \(--gpus N for another\): \d+ rules, \d+ modules, no problems\n", out), out


MISTAKES = [
    ("generate_device: cpu,", "generate_devise: cpu,", "kwargs: {generate_device: cpu", "kwarg 'generate_devise' unknown"),
    ("([3-5])", "([3-5)", "name: ^model\\.layers\\.([3-5])", "is no regular expression"),
    ("trait: experts", "trait: expert", "- match: {trait: experts", "'expert' unknown.*did you mean 'experts'"),
    ("^model$", "^modle$", "- match: {name: ^model$}", "matches no module of DeepseekV3ForCausalLM"),
    ('{3: "cuda:1"}', '{9: "cuda:1"}', "kwargs: {transfer_map", "layer 9 does not exist"),
    ("generate_device: cpu,", "generate_device: gpu,", "kwargs: {generate_device: cpu", "'gpu' is no device name"),
    ("torch.nn.Linear", "torch.nn.Linaer", "class: torch.nn.Linear", "did you mean 'Linear'"),
]


@pytest.mark.parametrize(("old", "new", "at", "message"), MISTAKES, ids=[mistake[-1] for mistake in MISTAKES])
def test_a_mistake_is_an_error_with_file_and_line(model, two, old, new, at, message):
    path = two((old, new))
    out = kt("check", path, model, code=1)
    found = [text for text in out.splitlines() if re.search(message, text)]
    assert found and found[0].startswith(f"error: {path}:{line(at)} (rule "), out
    assert out.splitlines()[-1].startswith("two.yaml does not fit DeepseekV3ForCausalLM")


def test_every_mistake_is_on_a_line_of_its_own(model, two):
    path = two(("([3-5])", "([3-5)"), ("trait: experts", "trait: expert"), ("{name: ^model$}", "{name: ^modle$}"))
    out = kt("check", path, model, code=1)
    assert [text.split(":")[0] for text in out.splitlines()[:-1]] == ["error"] * 3
    assert out.splitlines()[-1].endswith("3 errors")


def test_a_layer_left_on_another_device_is_an_error_of_the_rule_that_put_it_there(model, two):
    path = two(("([0-2])(", "([0-3])("), ("([3-5])(", "([45])("), ("([0-2])", "([0-3])"), ("([3-5])", "([45])"))
    out = kt("check", path, model, code=1)
    where = rf"{path}:{line('- match: {name: ' + chr(39))} \(rule 5\)"
    assert re.match(rf"error: {where}: model\.layers\.3\..* put layer 3 on cuda:0, but the input is on cuda:1", out), out


def test_a_rule_that_never_wins_is_a_warning_and_an_error_with_strict(model, two):
    path = two(("- match: {name: ^model$}", "- match: {name: '\\.mlp\\.experts$'}\n  replace: {class: default}\n- match: {name: ^model$}"))
    at = line("- match: {name: ^model$}")
    out = kt("check", path, model)
    assert f"warning: {path}:{at} (rule 4): never wins: all 5 modules it matches" in out
    assert "fits" in out.splitlines()[-1] and out.splitlines()[-1].endswith("1 warning")
    out = kt("check", path, model, "--strict", code=1)
    assert f"error: {path}:{at} (rule 4): never wins" in out and "does not fit" in out.splitlines()[-1]


def test_a_listed_module_that_cannot_be_imported_is_a_warning(model, two, monkeypatch):
    monkeypatch.setenv("KT_RULE_MODULES", "no_such_mod")
    out = kt("check", two(), model)
    assert "warning: KT_RULE_MODULES: 'no_such_mod' cannot be imported" in out and "Install it, correct the name" in out
    assert "error: KT_RULE_MODULES: 'no_such_mod'" in kt("check", two(), model, "--strict", code=1)


def test_a_way_back_is_a_note_and_no_error(model, two):
    path = two(("([0-2])(", "([0-24-5])("), ("([3-5])(", "([3])("), ("([0-2])", "([0-24-5])"), ("([3-5])", "([3])"),
               ('{3: "cuda:1"}', '{3: "cuda:1", 4: "cuda:0"}'))  # fmt: skip
    out = kt("check", path, model, "--strict")
    assert f"note: {path}:" in out and "layer 4 goes back from cuda:1 to cuda:0" in out


def test_yaml_that_does_not_parse_is_one_error_with_its_line(model, two):
    path = two(("kwargs: {generate_device: cpu, prefill_device: cpu}", "kwargs: {generate_device: cpu"))
    assert re.match(rf"error: {path}:\d+: not valid YAML", kt("check", path, model, code=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MLAA", "mixtral-8x7b"], r"^error: rule file 'MLAA': no such file.*did you mean 'MLA'"),
        (["MLA", "mixtral-8x7"], r"^error: model 'mixtral-8x7'.*did you mean 'mixtral-8x7b'"),
        (["MLA", "mixtral-8x7b", "--devices", "cuda"], r"^error: --devices 'cuda': expected NAME=NAME"),
    ],
)
def test_what_is_no_file_or_model_is_a_plain_error(arguments, message):
    assert re.search(message, kt("check", *arguments, code=1), re.DOTALL)


def test_gpus_are_those_the_file_names_unless_told(model, two, tmp_path):
    assert "cuda:1' does not exist on the machine planned for" in kt("check", two(), model, "--gpus", "1", code=1)
    assert "on 1 GPU (--gpus N for another)" in kt("check", "MLA", model)
    names_cpu = two(("cuda:0", "cpu"), ("cuda:0", "cpu"), ("cuda:1", "cpu"), ("cuda:1", "cpu"), ('{transfer_map: {3: "cuda:1"}}', "{}"),
                    ("cuda:0", "cpu"), ("cuda:1", "cpu"), ("cuda:1", "cpu"))  # fmt: skip
    out = kt("check", names_cpu, model)
    assert "on a machine without GPUs (--gpus N for another)" in out and out.splitlines()[-1].endswith("no problems"), out
    assert "on 2 GPUs" in kt("check", names_cpu, model, "--gpus", "2")
    assert "on 4 GPUs" in kt("check", "MLA", model, "--devices", "cuda:3=cpu")
    assert "fits" in kt("check", two(), model, "--gpus", "0", "--devices", "cuda=cpu")
    assert command.gpus_named(load_rules(two(("cuda:1", "cuda:999999")))) == command.MOST_GPUS


def test_check_as_json(model, two):
    path = two(("{name: ^model$}", "{name: ^modle$}"))
    found = json.loads(kt("check", path, model, "--json", code=1))
    assert found["ok"] is False and found["gpus"] == 2 and found["modules"] is None
    (finding,) = found["findings"]
    assert finding["level"] == "error" and finding["rule"] == 4
    assert set(finding) == {"level", "where", "rule", "text"}
    assert finding["where"] == f"{path}:{line('- match: {name: ^model$}')}"
    found = json.loads(kt("check", "MLA", model, "--json"))
    assert found["ok"] and found["findings"] == [] and found["rules"] == 10 and found["modules"] > 50


# --- explain ------------------------------------------------------------------------------------------------


def explained(*arguments):
    return {group["pattern"]: group for group in json.loads(kt("explain", *arguments, "--json"))["modules"]}


def reasons(group):
    return {other["rule"]: other["reason"] for other in group["others"]}


def test_each_way_a_rule_can_fail_is_a_reason(model, two):
    path = two()
    groups = explained(path, model, r"layers\.4\.(mlp\.experts|self_attn\.o_proj|input_layernorm)")
    linear = groups["model.layers.*.self_attn.o_proj"]
    assert linear["rule"] == 2 and linear["operator"] == "KTransformersLinear"
    assert linear["where"] == f"{path}:{line('([3-5])') - 1}"
    assert linear["devices"] == {"device": {"cuda:1": "4"}}
    assert reasons(linear)[1] == "name does not match"
    assert reasons(linear)[3] == "trait experts does not hold"
    assert reasons(linear)[6] == "matches, but rule 2 comes first"
    norm = groups["model.layers.*.input_layernorm"]
    assert norm["operator"] is None and norm["rule"] == 6
    assert reasons(norm)[1] == "name does not match; class is DeepseekV3RMSNorm, not Linear"
    hidden = groups["model.layers.*.mlp.experts.act_fn"]
    assert hidden["rule"] is None
    assert hidden["hidden"] == "hidden below model.layers.*.mlp.experts, which rule 3 took with recursive: False"
    assert reasons(hidden)[6] == f"matches, but {hidden['hidden']}"
    assert set(reasons(hidden)) == {1, 2, 3, 4, 5, 6, 7}


def test_the_rotary_embedding_that_all_layers_share_explains_the_rules_for_each(model, tmp_path):
    path = tmp_path / "rotary.yaml"
    one = {"class": "ktransformers.operators.RoPE.RotaryEmbedding"}
    path.write_text(yaml.safe_dump([
        {"match": {"name": rf"layers\.({layers})\.self_attn\.rotary"}, "replace": one} for layers in ("0", "[1-5]")
    ]))  # fmt: skip
    (group,) = explained(str(path), model, "rotary").values()
    assert group["rule"] == 1 and "another layer's model.rotary_emb" in reasons(group)[2]


def test_modules_are_grouped_over_layers_with_their_devices(model, two):
    group = explained("MLA", model, r"experts$", "--gpus", "2")["model.layers.*.mlp.experts"]
    assert len(group["modules"]) == 5
    assert group["devices"]["device"] == {"cpu": "1-5"}
    assert group["devices"]["out_device"] == {"cuda:0": "1-2", "cuda:1": "3-5"}
    out = kt("explain", "MLA", model, r"experts$", "--gpus", "2")
    assert "out_device: cuda:0 in layers 1-2, cuda:1 in layers 3-5" in out
    assert re.search(r"not rule 2 \(MLA\.yaml:\d+\): trait rotary does not hold", out)


def test_a_module_that_no_rule_takes(model):
    assert "no rule takes it: it stays as it is" in kt("explain", "MLA", model, r"^model\.norm$")


def test_the_whole_plan_says_where_layers_live_and_what_is_left(model, two):
    out = kt("explain", two(), model)
    assert "Where layers live: layers 0-2 cuda:0, layers 3-5 cuda:1, experts cpu." in " ".join(out.split())
    assert "Left to the default: model.embed_tokens (1)." in " ".join(out.split())
    assert "Planned for 2 GPUs; --gpus N plans for another." in out
    assert max(map(len, out.splitlines())) <= 100
    found = json.loads(kt("explain", two(), model, "--json"))
    assert found["layers"] == {"cuda:0": "0-2", "cuda:1": "3-5"} and found["experts"] == {"cpu": "1-5"}
    assert sum(row["count"] for row in found["rows"] if row["operator"].startswith("KTransformersExperts")) == 5
    assert {row["pattern"] for row in found["default"]} == {"model.embed_tokens"}


@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "is no regular expression"), ("exprets", "finds no module of DeepseekV3ForCausalLM")]
)
def test_a_pattern_that_is_none_or_finds_nothing_is_an_error(model, pattern, message):
    assert message in kt("explain", "MLA", model, pattern, code=1)


# --- extend -------------------------------------------------------------------------------------------------


def test_the_new_file_is_printed_and_plans_the_same(model, two):
    out = kt("extend", two(), model)
    assert out.startswith("# Two GPUs for a model of six layers.\n# Made by hand.\n")
    content = yaml.safe_load(out)
    assert content["devices"] == {"cuda:0": "0-2", "cuda:1": "rest"} and len(content["rules"]) == 5
    assert "transfer_map" not in out


def test_it_is_written_only_where_it_may(model, two, tmp_path, monkeypatch):
    source, target = two(), tmp_path / "new.yaml"
    assert "5 rules instead of 7" in kt("extend", source, model, "-o", str(target))
    assert yaml.safe_load(target.read_text())["devices"]
    for path in (target, source):
        assert "exists already" in kt("extend", source, model, "-o", str(path), code=1)
    assert open(source).read() == TWO_GPUS
    assert "expected a file's path" in kt("extend", source, model, "-o", str(tmp_path), code=1)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert "cannot be written: Permission denied" in kt("extend", source, model, "-o", source, "--force", code=1)
    monkeypatch.undo()
    assert open(source).read() == TWO_GPUS
    data = json.loads(kt("extend", source, model, "-o", source, "--force", "--json"))
    assert data["output"] == source and open(source).read() == data["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.yaml", "two.yaml"]
    assert "is in the extended form already" in kt("extend", source, model, code=1)


def test_a_packaged_file_needs_no_rewriting(model):
    assert "MLA.yaml: is in the extended form already" in kt("extend", "MLA", model, code=1)
