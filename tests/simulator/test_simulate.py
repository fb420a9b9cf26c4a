"""The simulation: right rule files pass it, planted mistakes are found with module and rule, and its bytes are right."""

import copy
import json
import re
import warnings
from importlib import resources

import pytest
import torch
import yaml
from ktransformers.optimize_rules import NAMES
from torch import nn
from typer.testing import CliRunner

from ktransformers import cli, configs, native
from ktransformers.cli import simulate as command
from ktransformers.errors import KTransformersError, RuleError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels import compiler, words
from ktransformers.kernels.layouts import layout_of, quantized_layout
from ktransformers.machine.hardware import describe
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.planner import formats
from ktransformers.planner.plan import Planner
from ktransformers.rules.chain import chain_problems
from ktransformers.rules.plan import plan
from ktransformers.simulator.fake import fake_devices
from ktransformers.simulator.recorder import ACTIVATIONS, CACHE, Recorder
from ktransformers.simulator.simulate import simulate
from tests import families
from tests.rules.test_packaged import MODELS
from tests.rules.test_published import STYLES
from tests.tiny import meta_model, tiny_config

LAYERS = {0: 2, 1: 2, 2: 2, 4: 4, 8: 8}
"""GPUs -> layers of the model that runs on them."""

FP32 = 4

MOE = resources.files("ktransformers.optimize_rules") / "MoE.yaml"

RIGHT = [
    {
        "match": {"trait": "experts"},
        "replace": {
            "class": "ktransformers.operators.experts.KTransformersExperts",
            "kwargs": {"generate_device": "cpu", "generate_op": "KExpertsCPU", "out_device": "cuda:0"},
        },
        "recursive": False,
    }
]
"""Experts on the CPU; all else on cuda:0, where modules go that no rule names."""


def config_of(name, layers):
    """The tiny model of packaged rules with as many layers; with 4 where those are of two kinds in turn."""
    family, overrides = MODELS[name]
    least = 4 if "layer_types" in families.FAMILIES.get(family, {}) or family in ("qwen3_next", "qwen3_5_moe_text") else 1
    return tiny_config(family, **{**overrides, "num_hidden_layers": max(layers, least)})


# --- right files ------------------------------------------------------------------------------------------------------


FEW = ("DeepSeek-V3", "Qwen3-MoE", "gpt-oss")
"""One name of each file, and one of a family whose experts are laid out otherwise: for two and four GPUs."""
KINDS = (*FEW, "DeepSeek-V3.2", "DeepSeek-V4", "GLM-4", "Llama-4", "MiniMax-M2", "Mixtral", "Qwen2-MoE", "Qwen3-Next")
"""One name of each kind of attention and of block, for eight GPUs."""
CASES = {0: FEW, 1: NAMES, 2: FEW, 4: FEW, 8: KINDS}


@pytest.mark.parametrize(("name", "gpus"), [(name, gpus) for gpus, names in CASES.items() for name in names])
def test_packaged_rules_run_on_any_number_of_gpus(name, gpus):
    found = simulate(config_of(name, LAYERS[gpus]), name, gpus=gpus, tokens=8)
    assert found.ok, "\n".join(map(str, found.problems))
    assert not found.problems
    assert set(found.devices()) == {"cpu", *(f"cuda:{i}" for i in range(gpus))}  # and each GPU has layers
    assert found.prefill.tokens == 8 and found.decode.tokens == 1 and sum(found.cache.values())


CLASSIC = [name for name, style in STYLES.items() if len(style.ranges) > 1 and "classes of V2" not in name]


@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_file_for_several_gpus_has_no_problem(name):
    style = STYLES[name]
    found = simulate(tiny_config(style.family, **style.overrides), style.rules(), tokens=8)
    assert found.ok and not found.problems, "\n".join(map(str, found.problems))
    assert set(found.cache) == {device for _, device in style.ranges}


EVERY_WAY = ["qwen3_moe", "deepseek_v4", "granitemoehybrid", "gemma4_text", "gpt_oss"]
"""Families whose decoders differ in what stands beside their layers."""


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("model_type", EVERY_WAY)
def test_the_default_rules_spread_any_family_over_the_gpus(model_type, gpus):
    config = families.config_of(model_type)
    found = simulate(config, "Default", gpus=gpus, tokens=8)
    assert found.ok and not found.problems, "\n".join(map(str, found.problems))
    layers = config.get_text_config().num_hidden_layers
    assert len([device for device in found.devices() if device != "cpu"]) == min(gpus, layers)


ODD = ["llama4_text", "jamba", "lfm2_moe", "minimax", "inkling_text", "gemma4_text", "nemotron_h"]
"""Families with code of another kind than most: rows for each expert, convolutions, scans, masks of their own."""


@pytest.mark.parametrize("model_type", ODD)
def test_a_family_with_code_of_its_own_runs_under_the_default_rules(model_type):
    found = simulate(families.config_of(model_type), "Default", gpus=1, tokens=8, context=8)
    assert found.ok and not found.problems, "\n".join(map(str, found.problems))


# --- planted mistakes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["Qwen3-30B", "Qwen3-Next serve", "GLM-4 serve"])
def test_a_published_file_without_a_rule_for_the_decoder_has_what_flows_moved_all_the_same(name):
    """Their embedding is on the CPU and their layers on a GPU; upstream's program carried the embeddings over."""
    style = STYLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = simulate(tiny_config(style.family, **style.overrides), style.rules(), gpus=1, tokens=8)
    assert not [problem for problem in found.problems if not problem.warning], found.problems


# The classic file for two GPUs: layers 0-2 on cuda:0, 3-5 on cuda:1. What its rules with these numbers are:
LINEAR, GATE, EXPERTS, HEAD, MODEL, LAYER, END = 4, 8, 10, 13, 14, 17, 18


def mistaken(*changes):
    """The rules with mistakes in them: (number of a rule, what to do with it)."""
    rules = copy.deepcopy(STYLES["DeepSeek-V3 two GPUs"].rules())
    for number, change in changes:
        change(rules[number - 1])
    return rules


def kwargs(**given):
    return lambda rule: rule["replace"]["kwargs"].update(given)


def on(device):
    return kwargs(generate_device=device, prefill_device=device)


def no_kwargs(rule):
    rule["replace"].pop("kwargs")


def only_placed(rule):
    rule["replace"] = {"class": "default", "kwargs": {"generate_device": "cuda:0"}}


def layers(old, new):
    def change(rule):
        rule["match"]["name"] = rule["match"]["name"].replace(old, new)

    return change


def forgets_layer(*numbers):
    return [(number, layers("([3-5])", "([35])")) for number in numbers]


MISTAKES = {
    "a layer in no range": (forgets_layer(2, 4, 6, 8, 10, 12, 17), r"model\.layers\.4\.", "", "cuda:0", "cuda:1", "mul"),
    "a layer's norms in no range": (forgets_layer(LAYER), r"model\.layers\.4\..*norm$", "", "cuda:0", "cuda:1", "mul"),
    "a device left out": ([(LAYER, no_kwargs)], r"model\.layers\.3\..*norm$", "17", "cuda:0", "cuda:1", "mul"),
    "a router elsewhere": ([(GATE, on("cuda:0"))], r"model\.layers\.3\.mlp\.gate$", "8", "cuda:0", "cuda:1", "mm"),
    "out_device of another": ([(EXPERTS, kwargs(out_device="cuda:0"))], r"layers\.3\.mlp\.experts$", "10", "cuda:0", "cuda:1", "add"),
    "out_device of a linear": ([(LINEAR, kwargs(out_device="cuda:0"))], r"layers\.3\.self_attn\.\w+_proj", "4", "cuda:0", "cuda:1", ""),
    "transfer_map a layer early": ([(MODEL, kwargs(transfer_map={2: "cuda:1"}))], r"model\.layers\.2\.", "", "cuda:0", "cuda:1", "mul"),
    "transfer_map a layer late": ([(MODEL, kwargs(transfer_map={1: "cuda:0", 4: "cuda:1"}))], r"model\.layers\.3\.", "", "cuda:1", "cuda:0", "mul"),
    "transfer_map to another GPU": ([(MODEL, kwargs(transfer_map={3: "cuda:2"}))], r"model\.layers\.3\.", "", "cuda:1", "cuda:2", "mul"),
    "lm_head out of reach": ([(HEAD, only_placed)], r"lm_head$", "13", "cuda:0", "cuda:1", "mm"),
}
"""What was done -> changes, module, rule, where it is, where its input is, the operation that fails ("": one of several)."""


def test_without_an_operator_between_layers_the_plan_brings_its_own():
    config = tiny_config("deepseek_v3", num_hidden_layers=6)
    assert simulate(config, mistaken((MODEL, only_placed)), gpus=8, tokens=8).ok
    found = plan(meta_model(config), mistaken((MODEL, only_placed)), gpus=8)
    assert found["model"].operator.__name__ == "DecoderModel" and found["lm_head"].operator is not None


def say(problems):
    return "\n".join(f"{p.module} | {p.rule} | {p.devices} | {p.operation} | {p}" for p in problems)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_found_with_module_and_rule(what):
    changes, module, rule, found_on, input_on, operation = MISTAKES[what]
    config = tiny_config("deepseek_v3", num_hidden_layers=6)
    found = simulate(config, mistaken(*changes), gpus=8, tokens=8)
    assert not found.ok
    chain = [p for p in found.problems if not p.operation]
    first = chain[0]
    assert re.search(module, first.module) and first.devices == (found_on, input_on), say(chain)
    assert not rule or first.rule == rule, say(chain)
    assert rule or first.rule or "no rule names it" in str(first), say(chain)
    assert found_on in str(first) and input_on in str(first)
    ran = [p for p in found.problems if p.operation]
    assert ran or operation == "", say(found.problems)
    if operation:
        assert operation in ran[0].operation and set(ran[0].devices) == {found_on, input_on}, say(ran)
        assert found.decode is None


@pytest.mark.parametrize("what", MISTAKES)
def test_the_chain_alone_finds_it_too_and_needs_no_forward(what):
    model = meta_model(tiny_config("deepseek_v3", num_hidden_layers=6))
    wrong, right = (plan(model, mistaken(*changes), gpus=8) for changes in (MISTAKES[what][0], ()))
    assert [p for p in chain_problems(model, wrong) if not p.warning]
    assert not chain_problems(model, right)


@pytest.mark.parametrize(("trait", "operator"), [("moe", "experts.KDeepseekV3MoE"), ("attention", "attention.KDeepseekV2Attention")])
def test_a_block_without_tensors_of_its_own_is_nowhere(trait, operator):
    block = {"match": {"trait": trait}, "replace": {"class": f"ktransformers.operators.{operator}", "kwargs": {"generate_device": "cpu"}}}
    child = {"match": {"name": r"\.(mlp|self_attn)\."}, "replace": {"class": "default", "kwargs": {"generate_device": "cuda:0"}}}
    experts = {**RIGHT[0], "replace": {**RIGHT[0]["replace"], "kwargs": {"generate_device": "cpu", "out_device": "cuda:0"}}}
    config = tiny_config("deepseek_v3", num_hidden_layers=2)
    found = simulate(config, [experts, block, child], gpus=1, tokens=8)
    assert found.ok, say(found.problems)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_attention_that_copies_a_packed_kv_b_has_to_be_where_its_parts_are(device):
    made = {"generate_device": "cpu", "generate_op": "KLinearCPUInfer"}
    packed = {"match": {"name": "kv_b_proj$"}, "replace": {"class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": made}}
    mla = {"match": {"trait": "mla"}, "replace": {"class": "ktransformers.operators.attention.KDeepseekV2Attention", "kwargs": {"generate_device": device}}}
    rest = {"match": {"name": "."}, "replace": {"class": "default", "kwargs": {"generate_device": "cpu"}}}
    experts = {**RIGHT[0], "replace": {**RIGHT[0]["replace"], "kwargs": {"generate_device": "cpu"}}}
    found = simulate(tiny_config("deepseek_v3", num_hidden_layers=2), [packed, mla, experts, rest], gpus=1, tokens=8)
    assert found.ok is (device == "cpu"), say(found.problems)
    if not found.ok:
        static, ran = found.problems
        assert static.module == ran.module == "model.layers.0.self_attn" and set(ran.devices) == {"cpu", "cuda:0"}


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_rule_of_the_extended_form_that_names_a_gpu_is_found_where_layers_live_elsewhere(gpus):
    router = {"match": {"trait": "router"}, "replace": {"class": "default", "kwargs": {"generate_device": "cuda:0"}}}
    decoder = {"match": {"trait": "decoder"}, "replace": {"class": "ktransformers.operators.models.DecoderModel"}}
    experts = {**RIGHT[0], "replace": {**RIGHT[0]["replace"], "kwargs": {"generate_device": "cpu", "out_device": "layer"}}}
    config = tiny_config("deepseek_v3", num_hidden_layers=4)
    found = simulate(config, {"devices": "auto", "rules": [router, decoder, experts]}, gpus=gpus, tokens=8)
    assert found.ok is (gpus == 1), say(found.problems)
    if gpus == 2:
        static, ran = found.problems
        assert static.module == ran.module == "model.layers.2.mlp.gate" and static.rule == ran.rule == "1"
        assert "and so for 1 more modules" in str(static) and set(ran.devices) == {"cuda:0", "cuda:1"}


def test_a_problem_names_file_and_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(mistaken((EXPERTS, kwargs(out_device="cuda:0"))), sort_keys=False))
    found = simulate(tiny_config("deepseek_v3", num_hidden_layers=6), path, tokens=8)
    line = found.problems[0].rule
    number = int(re.fullmatch(r"10 \(mine\.yaml:(\d+)\)", line)[1])
    assert "experts" in path.read_text().splitlines()[number]
    assert f"rule {line} has out_device cuda:0" in str(found.problems[0])


def test_a_layer_that_goes_back_is_told_of_and_runs():
    taken = [(number - 1, layers("(0|[1-2])", "([0-24])")) for number in (2, 4, 6, 8, 10, 12, 17)]
    rules = mistaken(*taken, (MODEL, lambda rule: rule["replace"]["kwargs"].pop("transfer_map")))
    found = simulate(tiny_config("deepseek_v3", num_hidden_layers=6), rules, tokens=8)
    assert found.ok and found.decode, say(found.problems)
    assert [p.warning for p in found.problems] == [True, True] and "layer 4 goes back" in str(found.problems[0])


class Elsewhere(BaseInjectedModule):
    """An operator whose result is on a device that nobody expects."""

    def forward(self, hidden):
        return self.orig_module.forward(hidden).to("cuda:3")


class Narrow(BaseInjectedModule):
    """An operator that loses a column."""

    def forward(self, hidden):
        return self.orig_module.forward(hidden)[..., 1:]


@pytest.mark.parametrize(("operator", "devices", "operation"), [(Elsewhere, 2, "add"), (Narrow, 1, "add")])
def test_what_only_a_forward_can_show_names_the_module_the_rule_and_the_operation(operator, devices, operation):
    model = tiny_config("qwen3_moe")
    rules = [
        {"match": {"name": r"layers\.1\.self_attn\.o_proj$"}, "replace": {"class": f"{__name__}.{operator.__name__}", "kwargs": {"generate_device": "cuda:0"}}},
        *RIGHT,
    ]
    found = simulate(model, rules, gpus=8, tokens=8)
    (problem,) = found.problems
    assert problem.module == "model.layers.1" and operation in problem.operation and len(problem.devices) == devices
    assert found.prefill is None and not found.ok and found.weights["cuda:0"]
    if operator is Elsewhere:
        assert "made in model.layers.1.self_attn.o_proj (rule 1 placed it) on cuda:3" in str(problem)
    else:
        assert "[1, 8, 64]" in str(problem) and "[1, 8, 63]" in str(problem)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [0, 5])
def test_weights_cache_and_copies_are_what_one_computes_by_hand(dtype, context):
    config = tiny_config("qwen3_moe", dtype=dtype)
    batch, tokens, hidden, layers_, size = 2, 8, 64, 3, dtype.itemsize
    found = simulate(config, RIGHT, gpus=1, tokens=tokens, batch=batch, context=context)
    assert found.ok, say(found.problems)
    experts = layers_ * 8 * 3 * 64 * 32 * size
    rest = sum(p.numel() for name, p in meta_model(config).named_parameters() if ".experts." not in name) * size
    assert found.weights["cpu"] == experts
    frequencies = 2 * 8 * FP32  # inv_freq and original_inv_freq
    assert found.weights["cuda:0"] == rest + frequencies
    kv_heads, head_dim = 2, 16
    assert found.cache == {"cuda:0": layers_ * 2 * batch * (context + tokens + 1) * kv_heads * head_dim * size}
    for report, length in ((found.prefill, tokens), (found.decode, 1)):
        rows = batch * length
        there = layers_ * rows * (hidden * size + 3 * 8 + 3 * size)  # hidden states, ids int64, weights
        back = layers_ * rows * hidden * size
        moved = {(t.source, t.target): (t.count, t.nbytes) for t in report.transfers}
        assert moved == {("cpu", "cuda:0"): (layers_, back), ("cuda:0", "cpu"): (3 * layers_, there)}
        assert {name for name, *_ in report.moves} == {f"model.layers.{n}.mlp.experts" for n in range(layers_)}
        # On the CPU a layer's input is beside the result; the copies of ids and weights go before the next layer's.
        assert report.peak["cpu"] == rows * (2 * hidden * size + 3 * 8 + 3 * size)


class Steps(nn.Module):
    """Two temporaries at a time: 3 * x is gone before the sum is made."""

    def forward(self, x):
        a = x * 2
        b = (x * 3).relu()
        return a + b


def test_the_peak_is_the_most_that_was_alive_at_once():
    recorder = Recorder()
    with fake_devices(), recorder:
        x = torch.empty(4, 8, device="cuda:1")
        record = recorder.begin()
        out = Steps()(x)
        assert record.peak == {"cuda:1": 4 * 4 * 8 * FP32}  # x, a, 3 * x and its relu; then x, a, b, the sum
        assert recorder.live(ACTIVATIONS) == {"cuda:1": 2 * 4 * 8 * FP32}
        view = out[1:, :2].transpose(0, 1)
        del out
        assert recorder.live(ACTIVATIONS) == {"cuda:1": 2 * 4 * 8 * FP32}  # the view keeps all of it
        recorder.mark_cache({"layers": [view]})
        assert recorder.live(CACHE) == recorder.live(ACTIVATIONS) == {"cuda:1": 4 * 8 * FP32}
        del view, x
    assert recorder.live(CACHE) == recorder.live(ACTIVATIONS) == {}


def test_bytes_of_a_real_checkpoint_are_counted_where_one_is_given():
    config = tiny_config("qwen3_moe")

    class Stored:
        """A checkpoint whose tensors take a byte a number."""

        def __getattr__(self, name):
            return lambda *args: {"experts_problem": "", "can_pack": True, "is_stored_as": True}.get(name, [])

        def nbytes(self, name):
            return meta_model(config).get_parameter(name).numel()

    found = simulate(config, RIGHT, gpus=1, tokens=8, weights=Stored())
    assert found.weights["cpu"] == 3 * 8 * 3 * 64 * 32


def test_torch_experts_are_counted_on_their_gpu():
    there = {"generate_device": "cuda:1", "generate_op": "KExpertsTorch"}
    rules = copy.deepcopy(RIGHT)
    rules[0]["replace"]["kwargs"].update(there)
    found = simulate(tiny_config("qwen3_moe"), rules, gpus=2, tokens=8)
    assert found.ok and found.weights["cuda:1"] == 3 * 8 * 3 * 64 * 32 * FP32 and "cpu" not in found.devices()


LINEARS = {"match": {"name": r"(q|k|v|o)_proj$"}, "replace": {"class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": {"generate_device": "cuda:0"}}}


@pytest.mark.parametrize(
    ("name", "form", "layout"),
    [(None, "Q4_K", "Q4_K"), ("KLinearMarlin", "Q4_K", "Q4_K"), (None, "INT4", "I4"), (None, "BF16", None),
     ("KLinearTorch", "Q4_K", None), ("VLinearMarlin", "BF16", "INT4"), ("KLinearMarlin", "FP8", "F8_E4M3"), ("KLinearFP8", "FP8", "F8_E4M3"), ("KLinearFP8", "BF16", None)],
)  # fmt: skip
def test_linear_layers_on_a_gpu_take_their_packed_bytes(name, form, layout):
    """By what the checkpoint has; what has no packed form is quantized where a rule names the operator."""
    config = tiny_config("qwen3_moe", dtype=torch.bfloat16, hidden_size=256, head_dim=64)
    rules = copy.deepcopy([LINEARS, *RIGHT])
    if name:
        rules[0]["replace"]["kwargs"]["generate_op"] = name
    stored = formats.named_format(form, config.num_hidden_layers, False)

    def weights(rules):
        found = simulate(config, rules, gpus=1, tokens=8, size=stored.stored, form=stored.layout)
        assert found.ok, say(found.problems)
        return found.weights["cuda:0"]

    model = meta_model(config)
    matrices = [m.weight for name, m in model.named_modules() if re.search(LINEARS["match"]["name"], name)]
    dense = sum(2 * matrix.numel() for matrix in matrices)
    if layout == "INT4":
        packed = quantized_layout(torch.bfloat16, 256, group_size=64)
    else:
        packed = layout and stored.layout("x_proj.weight", (1, 256), torch.bfloat16)
    expected = sum(packed.nbytes(matrix.shape) for matrix in matrices) if packed else dense
    assert weights(rules) - weights(RIGHT) == expected - dense


def test_experts_of_whole_layers_on_a_gpu_take_their_packed_bytes():
    config = tiny_config("qwen3_moe", dtype=torch.bfloat16, hidden_size=256, moe_intermediate_size=256)
    rules = copy.deepcopy(RIGHT)
    rules[0]["replace"]["kwargs"].update(generate_device="cuda:1", generate_op="KExpertsMarlin")
    for form, name in (("Q4_K", "Q4_K"), ("BF16", "INT4")):
        stored = formats.named_format(form, config.num_hidden_layers, False)
        found = simulate(config, rules, gpus=2, tokens=8, size=stored.stored, form=stored.layout)
        assert found.ok, say(found.problems)
        words = layout_of("Q4_K") if name == "Q4_K" else quantized_layout(torch.bfloat16, 256, group_size=64)
        each = words.nbytes((8, 2 * 256, 256)) + words.nbytes((8, 256, 256))
        assert found.weights["cuda:1"] == config.num_hidden_layers * each and "cpu" not in found.weights


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("hot", [0, 3, 8])
def test_experts_on_a_gpu_take_its_memory_and_none_of_the_cpu_s(family, hot):
    rules = copy.deepcopy(RIGHT)
    rules[0]["replace"]["kwargs"].update(gpu_experts=hot, gpu_device="cuda:1")
    config = tiny_config(family)
    found = simulate(config, rules, gpus=2, tokens=8)
    none = simulate(config, RIGHT, gpus=2, tokens=8)
    assert found.ok, say(found.problems)
    layers_, experts = config.num_hidden_layers, meta_model(config).model.layers[-1].mlp.experts
    weights = (experts.gate_up_proj.numel() + experts.down_proj.numel()) * FP32 // 8
    biases = (experts.gate_up_proj_bias.numel() + experts.down_proj_bias.numel()) * FP32 // 8 if family == "gpt_oss" else 0
    slots = 9 * 8 if hot else 0  # where each expert is, int64
    assert found.weights.get("cuda:1", 0) == layers_ * (hot * (weights + biases) + slots)
    kept = (8 - hot) * weights + (8 * biases if hot < 8 else 0)
    assert found.weights.get("cpu", 0) == layers_ * kept
    assert none.weights["cpu"] == layers_ * 8 * (weights + biases)


# --- what goes in, what stays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"gpus": -1}, {"gpus": 1.5}, {"tokens": 0}, {"batch": 0}, {"context": -3}, {"tokens": True}], ids=str)
def test_sizes_that_are_none_are_refused(given):
    with pytest.raises(KTransformersError, match=f"{next(iter(given))}: found"):
        simulate(tiny_config("qwen3_moe"), "Qwen3-MoE", **given)


def test_a_device_beyond_the_pretended_ones_is_a_mistake_in_the_rules():
    with pytest.raises(RuleError, match="'cuda:1' does not exist"):
        simulate(tiny_config("deepseek_v3", num_hidden_layers=6), mistaken(), gpus=1)


def test_the_model_given_stays_as_it_is_and_so_do_the_c_library_and_the_kernels():
    def now():
        return native.Experts, native.Linear, native.available, words.write, words.Words.expert, compiler.why_not

    model, before = meta_model(tiny_config("qwen3_moe")), now()
    found = simulate(model, "Qwen3-MoE", gpus=1, tokens=8)
    assert found.ok and all(p.is_meta for p in model.parameters())
    assert not any(isinstance(module, BaseInjectedModule) for module in model.modules())
    assert before == now()
    with pytest.raises(KTransformersError, match="weights in memory"):
        simulate(nn.Linear(2, 2), "Qwen3-MoE")


def test_progress_counts_every_layer_of_both_passes_and_json_has_it_all():
    seen = []
    found = simulate(tiny_config("qwen3_moe"), "Qwen3-MoE", gpus=1, tokens=8, on_layer=lambda *at: seen.append(at))
    assert seen == [(n, 6) for n in range(1, 7)]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ok"] and data["weights"] == found.weights and data["prefill"]["transfers"][0]["nbytes"] > 0


def test_the_command_prints_tables_or_json_and_exits_with_1_on_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "read_config", lambda model: tiny_config("deepseek_v3", num_hidden_layers=6))

    def kt(*arguments):
        return CliRunner().invoke(cli.app, ["simulate", *arguments])

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(mistaken((EXPERTS, kwargs(out_device="cuda:0"))), sort_keys=False))
    right = kt("DeepSeek-V3", "tiny", "--gpus", "2", "--json")
    assert right.exit_code == 0 and json.loads(right.stdout)["ok"]
    tables = "\n".join(map(str, command._tables(simulate(tiny_config("qwen3_moe"), RIGHT, gpus=1))))
    assert "Every operation found its operands on one device" in tables
    failed = kt(str(wrong), "tiny", "--json")
    assert failed.exit_code == 1 and json.loads(failed.stdout)["problems"][0]["rule"].startswith("10 (wrong.yaml:")
    assert kt("DeepSeek-V9", "tiny").exit_code == 1


def test_the_command_simulates_the_gpus_that_the_file_names(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "read_config", lambda model: tiny_config("qwen3_moe"))
    rules = yaml.safe_load(MOE.read_text())["rules"]
    for devices, gpus in (({"cpu": "0-"}, 0), ({"cuda:0": "0", "cuda:1": "1-"}, 2), ("auto", 8)):
        path = tmp_path / "rule.yaml"
        path.write_text(yaml.safe_dump({"devices": devices, "rules": rules}))
        ran = CliRunner().invoke(cli.app, ["simulate", str(path), "tiny", "--tokens", "4", "--json"])
        assert json.loads(ran.stdout)["gpus"] == gpus, ran.output


def test_packed_weights_on_the_cpu_are_counted_packed(checkpoint, tmp_path):
    """In a GGUF, in a named format, and as published; dense only where nothing says how weights are stored."""
    sizes_of = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    _, folder = checkpoint("qwen3_moe", dtype=torch.bfloat16, **sizes_of)
    path = tmp_path / "model.gguf"
    quantize_folder(folder, path, "Q4_K_M")
    rule = {"devices": {"cpu": "0-"}, "rules": yaml.safe_load(MOE.read_text())["rules"]}
    found = {}
    for name, arguments in {
        "gguf": [str(path)], "named": [str(folder), "--format", "Q4_K_M"], "published": [str(folder)],
        "weights": [str(folder), "--weights", str(path)],
    }.items():  # fmt: skip
        rule_file = tmp_path / "rule.yaml"
        rule_file.write_text(yaml.safe_dump(rule))
        ran = CliRunner().invoke(cli.app, ["simulate", str(rule_file), *arguments, "--tokens", "4", "--json"])
        assert ran.exit_code == 0, ran.output
        found[name] = json.loads(ran.stdout)["weights"]["cpu"]
    for name, nbytes in found.items():
        form = {"named": "Q4_K_M"}.get(name)
        model = str(path) if name == "gguf" else str(folder)
        planned = Planner(model, weights=path if name == "weights" else None, form=form).plan(describe((), "64GiB"))
        assert nbytes == pytest.approx(planned.memory["cpu"].weights, rel=0.02), name
    assert found["gguf"] == found["weights"] == pytest.approx(found["named"], rel=0.1)
    assert found["published"] > 2 * found["gguf"]
