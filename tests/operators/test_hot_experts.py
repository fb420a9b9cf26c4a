"""Some experts of a layer elsewhere than the others: the same logits in every family and format, and clear refusals."""

import re

import pytest
import torch
from ktransformers.models.traits import layer_of
from transformers import AutoModelForCausalLM

from ktransformers import optimize_and_load, plan
from ktransformers.errors import DeviceError, RuleError, ranges
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.loaders import bind_safetensors
from ktransformers.operators import hot_experts
from ktransformers.operators.base_operator import InferenceState
from ktransformers.operators.experts import KExpertsCPU, KExpertsTorch, KTransformersExperts
from ktransformers.operators.hot_experts import expert_ids
from ktransformers.simulator.fake import fake_devices
from tests import families
from tests.dict_weights import DictWeights
from tests.operators.test_experts_operator import CPU, KEY, loaded, parts, routing
from tests.operators.test_published_checkpoints import checkpoint, gpt_oss, gpt_oss_config, qwen3_moe_config
from tests.tiny import meta_model, random_ids, randomize, relative_error, save, tiny_config, tiny_model

OPS = pytest.mark.parametrize("op", ["KExpertsTorch", "KExpertsCPU"])


def rules(gpu_experts, op="KExpertsCPU", **more):
    kwargs = {"generate_op": op, **CPU, "gpu_experts": gpu_experts, "gpu_device": "cpu", **more}
    name = "ktransformers.operators.experts.KTransformersExperts"
    return [{"match": {"trait": "experts"}, "replace": {"class": name, "kwargs": kwargs}}]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def splits(model):
    return [module.split for module in model.modules() if isinstance(module, KTransformersExperts)]


# --- which experts ----------------------------------------------------------------------------------------------------

SPECS = [
    (None, []),
    (0, []),
    (3, [0, 1, 2]),
    (8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ([], []),
    ([7, 0], [0, 7]),
    ("", []),
    (" 5 ", [5]),
    ("6,0 - 2", [0, 1, 2, 6]),
    ({2: 2, 3: "7"}, [0, 1]),
    ({"2": [4]}, [4]),
    ({1: 8}, []),
    ({2: None}, []),
]


@pytest.mark.parametrize(("spec", "ids"), SPECS, ids=repr)
def test_every_form_of_naming_experts(spec, ids):
    assert expert_ids(spec, 2, 8) == ids


BAD = [
    (9, "found 9, expected 0 to 8"),
    (-1, "found -1, expected 0 to 8"),
    (True, "found 'True'"),
    (2.5, "found '2.5'"),
    ([0, 8], "no expert 8 here; expected ids from 0 to 7"),
    ([-1], "no expert -1 here"),
    ([1, 1], "expert 1 is named twice"),
    ([True], "found '[True]'"),
    ("0-99999999", "no expert 99999999 here"),
    ("9999999999", "no id and no range"),
    ("3-1", "'3-1' is no id and no range"),
    ("1,,2", "'' is no id and no range"),
    ("0-3,2", "expert 2 is named twice"),
    ("a few", "'a few' is no id and no range"),
    ("²", "no id and no range"),
    ({2: [9]}, "no expert 9 here"),
    ({2: {2: 1}}, "layer 2 has a mapping of its own"),
    ({"two": 1}, "'two' is no layer number"),
    ({True: 1}, "'True' is no layer number"),
    ({2: 1, "2": 1}, "layer 2 is named twice"),
    ({3: 1, 9: 1}, "no experts in layers 3,9"),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=repr)
def test_what_names_no_experts_is_a_problem_before_loading(spec, message):
    """With weights and without; the operator that is built without asking says the same."""
    _, meta, weights = parts()
    for source in (weights, None):
        (problem,) = KTransformersExperts.check(KEY, meta, {**CPU, "gpu_experts": spec, "gpu_device": "cpu"}, source)
        assert problem.startswith("gpu_experts: ") and message in problem
    if "no experts in layers" not in message:
        with pytest.raises(RuleError, match=re.escape(message)):
            KTransformersExperts(KEY, weights, None, meta, **CPU, gpu_experts=spec, gpu_device="cpu")


def test_a_problem_of_many_layers_is_one_line_with_its_rule():
    with pytest.raises(RuleError, match=r"rule 1: model\.layers\.\*\.mlp\.experts: gpu_experts: no expert 8.*3 modules"):
        plan(meta_model(tiny_config("qwen3_moe")), rules("0-8"))


@pytest.mark.parametrize("seed", range(20))
def test_ranges_are_read_back(seed):
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[: 3 * seed].tolist()
    assert expert_ids(ranges(ids), 0, 64) == sorted(ids)


def test_ranges_and_layers():
    assert ranges([0, 1, 2, 15, 40, 41]) == "0-2,15,40-41" and ranges([]) == ""
    assert layer_of("model.layers.12.mlp.experts") == 12 and layer_of("mlp.experts") is None


# --- the same results -------------------------------------------------------------------------------------------------

MASKS = [[0], "1-3,6", 7, 8]


@OPS
@pytest.mark.parametrize("spec", MASKS, ids=str)
def test_one_layer_equals_transformers(spec, op, exact):
    """Many tokens, one, none, all on one expert of either part; ids of nobody; an expert named twice."""
    truth, meta, weights = parts()
    module = loaded(meta, weights, op, gpu_experts=spec, gpu_device="cpu")
    same = torch.full((5, 2), 2)
    cases = [routing(), routing(1), routing(0), routing(40, 5)]
    cases += [(*routing(5, 2)[:1], same + shift, torch.rand(5, 2)) for shift in (0, 5)]
    with torch.no_grad():
        for case in cases:
            torch.testing.assert_close(module(*case), truth(*case), rtol=1e-5, atol=1e-5)
        hidden, ids, w = routing(4)
        ids[0], ids[1, 1:], ids[2] = torch.tensor([8, -1, 900]), -1, 6
        found, kept = module(hidden, ids, w), loaded(meta, weights, op)(hidden, ids, w)
    torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-5)
    assert not found[0].any()


FAMILIES = ["deepseek_v2", "deepseek_v4", "gpt_oss", "llama4_text", "longcat_flash", "mixtral", "nemotron_h", "qwen3_moe"]
"""Biases, gate and up in turn, stored by columns, clamped, without a gate, with idle experts."""


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_computes_as_transformers_does(model_type, tmp_path, exact):
    torch.manual_seed(0)
    config = families.config_of(model_type)
    truth = randomize(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    )
    save(truth, tmp_path)
    ids = random_ids(2, 9)
    for spec in ("1,4-6", 8):
        model = optimize_and_load(meta_model(truth.config), rules(spec), tmp_path, progress=False)
        assert splits(model) and all(split.hot.ids == expert_ids(spec, 0, 8) for split in splits(model))
        assert relative_error(logits(model, ids), logits(truth, ids)) < 1e-5


@OPS
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_a_quantized_gguf(kind, op, tmp_path, exact):
    """As if all were computed by the inner operator; parts of different types, and another mask for each layer."""
    model = tiny_model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2)
    quantize_folder(save(model, tmp_path), tmp_path / "q.gguf", kind)
    ids, spec = random_ids(2, 9), {0: [2, 5], 1: "0-6"}
    whole, split = (
        optimize_and_load(meta_model(model.config), rules(mask, op), tmp_path / "q.gguf", progress=False)
        for mask in (None, spec)
    )
    assert [part.hot.ids for part in splits(split)] == [[2, 5], [0, 1, 2, 3, 4, 5, 6]]
    assert relative_error(logits(split, ids), logits(whole, ids)) < 1e-5
    assert relative_error(logits(split, ids), logits(model, ids)) > 1e-4  # it is quantized


@OPS
@pytest.mark.parametrize("form", ["fp8_block", "int4_packed", "gptq4_act_order", "awq4"])
def test_a_quantized_folder(form, op, tmp_path, exact):
    folder, truth = checkpoint(tmp_path, form)
    model, ids = meta_model(qwen3_moe_config()), random_ids(2, 9, vocab=80)
    optimize_and_load(model, [*rules({0: "1", 1: "2-3"}, op)], folder, progress=False)
    assert relative_error(logits(model, ids), logits(truth, ids)) < 2e-5


@OPS
def test_blocks_whose_rows_are_gate_and_up_in_turn(op, tmp_path, exact):
    folder, truth = gpt_oss(tmp_path)
    model, ids = meta_model(gpt_oss_config()), random_ids(2, 9, vocab=80)
    optimize_and_load(model, rules("1,3", op), folder, progress=False)
    assert relative_error(logits(model, ids), logits(truth, ids)) < 2e-5


def test_bf16_stays_bf16():
    truth, meta, weights = parts(dtype=torch.bfloat16)
    hidden, ids, w = routing(dtype=torch.bfloat16)
    with torch.no_grad():
        found = loaded(meta, weights, "KExpertsCPU", gpu_experts=4, gpu_device="cpu")(hidden, ids, w)
        expected = truth.float()(hidden.float(), ids, w)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_gradients_pass_when_both_parts_are_torch():
    truth, meta, weights = parts()
    hidden, ids, w = routing()
    hidden.requires_grad_(), w.requires_grad_()
    module = loaded(meta, weights, "KExpertsTorch", gpu_experts="2-4", gpu_device="cpu")
    (expected,) = torch.autograd.grad(truth(hidden, ids, w).square().sum(), hidden)
    (found,) = torch.autograd.grad(module(hidden, ids, w).square().sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- who does what ----------------------------------------------------------------------------------------------------


def counting(module, monkeypatch):
    """The calls of either part, by name, with the ids that they were given."""
    calls = []
    for name, part in (("hot", module.split.hot), ("rest", module.active)):
        forward = part.forward
        monkeypatch.setattr(
            part, "forward", lambda x, ids, w, name=name, run=forward: calls.append((name, ids)) or run(x, ids, w)
        )
    return calls


@OPS
def test_a_part_without_tokens_does_nothing_and_the_gpu_is_first(op, monkeypatch):
    _, meta, weights = parts()
    module = loaded(meta, weights, op, gpu_experts="0-3", gpu_device="cpu")
    calls, (hidden, _, w) = counting(module, monkeypatch), routing(2, 2)
    for ids, expected in (
        ([[0, 3], [1, 2]], ["hot"]),
        ([[4, 7], [6, 5]], ["rest"]),
        ([[0, 7], [1, 2]], ["hot", "rest"]),
        ([[-1, 8], [8, 99]], []),
    ):
        calls.clear()
        module(hidden, torch.tensor(ids), w)
        assert [name for name, _ in calls] == expected, ids
        seen = [given for name, given in calls if name == "rest"]
        assert all(((given == -1) | (given > 3)).all() for given in seen), "an expert of the GPU reached the other part"


def test_the_other_part_reads_no_byte_of_an_expert_on_the_gpu(exact):
    """Poisoned after the GPU has them: nothing changes."""
    _, meta, weights = parts()
    module = KTransformersExperts(KEY, weights, None, meta, **CPU, gpu_experts=[1, 4], gpu_device="cpu")
    given = weights.experts(KEY)
    weights.experts = lambda key: given
    module.load()
    inputs = routing()
    before = module(*inputs)
    for matrices in (given.gate, given.up, given.down):
        for e in (1, 4):
            matrices[e].data.fill_(255)
    assert torch.equal(module(*inputs), before)
    kept = {id(matrix) for matrix in given.up} & {id(matrix) for matrix in hot_experts.without(given, [2, 3]).up}
    assert kept == {id(given.up[2]), id(given.up[3])}


def test_all_on_the_gpu_needs_no_other_operator(monkeypatch):
    """No C library, no tensor of the inner operator, no look at where tokens go."""
    truth, meta, weights = parts()
    kwargs = {**CPU, "gpu_experts": 8, "gpu_device": "cpu"}
    monkeypatch.setattr("ktransformers.native.available", lambda: False)
    assert KTransformersExperts.check(KEY, meta, kwargs, weights) == []
    assert len(KTransformersExperts.check(KEY, meta, {**kwargs, "gpu_experts": 7}, weights)) == 1
    module = KTransformersExperts(KEY, weights, None, meta, **kwargs)
    module.load()
    assert module.active.experts is None
    monkeypatch.setattr(hot_experts, "some", None)
    inputs = routing()
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), truth(*inputs), rtol=1e-5, atol=1e-5)


@OPS
def test_dense_weights_hold_only_the_experts_of_their_part(op):
    _, meta, weights = parts()
    module = loaded(meta, weights, op, gpu_experts="0,2,7", gpu_device="cpu")
    assert module.split.hot.gate_up.shape == (3, 64, 64) and module.split.hot.down.shape == (3, 64, 32)
    assert op == "KExpertsCPU" or module.active.down.shape == (5, 64, 32)
    module.to(torch.float64)
    assert module.split.hot.down.dtype == torch.float32
    assert not module.state_dict() and not list(module.parameters()) and not list(module.children())
    assert repr(module) == f"KTransformersExperts({op} on cpu, 3 of 8 experts on cpu)"


def test_unload_load_and_another_operator_for_prefill(exact):
    truth, meta, weights = parts()
    module = loaded(meta, weights, "KExpertsCPU", prefill_op="KExpertsTorch", gpu_experts=5, gpu_device="cpu")
    inputs, on_gpu = routing(), module.split.hot.down
    with torch.no_grad():
        for mode, op in ((InferenceState.PREFILL, KExpertsTorch), (InferenceState.GENERATE, KExpertsCPU)):
            module.set_inference_mode(mode)
            assert isinstance(module.active, op) and module.split.hot.down is on_gpu  # not read again
            torch.testing.assert_close(module(*inputs), truth(*inputs), rtol=1e-5, atol=1e-5)
        module.unload()
        assert module.split.hot.down is None and module.split.hot.slots is None and module.active.experts is None
        module.set_inference_mode(InferenceState.PREFILL)
        torch.testing.assert_close(module(*inputs), truth(*inputs), rtol=1e-5, atol=1e-5)
        module.load(mode=InferenceState.UNLOAD)
        assert module.split.hot.down is None


# --- devices ----------------------------------------------------------------------------------------------------------


def test_the_gpu_device_is_out_device_unless_given_and_is_renamed_with_the_others():
    _, meta, weights = parts()
    make = lambda **kwargs: KTransformersExperts(KEY, weights, None, meta, **CPU, gpu_experts=1, **kwargs)  # noqa: E731
    assert make().split.hot.device == torch.device("cuda")
    assert make(out_device="cuda:1").split.hot.device == torch.device("cuda:1")
    assert make(out_device="cuda:1", gpu_device="cuda:2").split.hot.device == torch.device("cuda:2")
    model = meta_model(tiny_config("qwen3_moe"))
    replaced = plan(model, rules(4, gpu_device="cuda:3"), devices={"cuda": "cpu"})["model.layers.1.mlp.experts"]
    assert replaced.kwargs["gpu_device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_problem_before_loading():
    model = meta_model(tiny_config("qwen3_moe"))
    with pytest.raises(RuleError, match="gpu_device: 'cuda:7' does not exist"):
        plan(model, rules(4, gpu_device="cuda:7"))
    with pytest.raises(RuleError, match="gpu_device: not given, nor is out_device, and 'cuda', which that means"):
        plan(model, rules(4, gpu_device=None))
    plan(model, rules(0, gpu_device=None))


def test_a_gpu_that_is_full_is_one_error(monkeypatch):
    _, meta, weights = parts()
    module = KTransformersExperts(KEY, weights, None, meta, **CPU, gpu_experts=5, gpu_device="cpu")

    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(hot_experts, "dense", full)
    with pytest.raises(DeviceError, match=r"layers\.2\.mlp\.experts: 5 experts do not fit on cpu\. Name fewer"):
        module.load()


def test_weights_that_cannot_be_read_one_by_one_are_a_problem(tmp_path, monkeypatch):
    """Inkling-2's experts, were their conversion one that only transformers knows: all at once."""
    monkeypatch.setattr(bind_safetensors, "_stays_packed", lambda *_: None)
    truth = AutoModelForCausalLM.from_config(families.config_of("inkling2_text"))
    save(truth, tmp_path)
    message = "gate_up_proj is stored in another form .* and experts cannot be read one by one; leave gpu_experts out"
    with pytest.raises(RuleError, match=message):
        optimize_and_load(meta_model(truth.config), rules(2, "KExpertsTorch"), tmp_path, progress=False)
    optimize_and_load(meta_model(truth.config), rules(0, "KExpertsTorch"), tmp_path, progress=False)


def test_experts_whose_rows_a_file_mixes_are_read_one_by_one(tmp_path):
    """Inkling-2's gate and up take turns row by row in its file; the model has them one after the other."""
    truth = randomize(AutoModelForCausalLM.from_config(families.config_of("inkling2_text")).eval())
    save(truth, tmp_path)
    model = optimize_and_load(meta_model(truth.config), rules(2, "KExpertsTorch"), tmp_path, progress=False)
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert relative_error(model(ids).logits, truth(ids).logits) < 1e-4


@pytest.mark.parametrize("hidden_on", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("out", [None, "cpu", "cuda:0"])
@pytest.mark.parametrize("spec", ["1-3", 8])
def test_results_and_operands_are_on_their_devices(hidden_on, out, spec, monkeypatch):
    """Fake tensors refuse to mix devices; each part computes where its rule says."""
    model = meta_model(tiny_config("qwen3_moe"))
    seen = []

    def product(part, hidden, ids, weights):
        """As many tokens for each expert as there are, whatever the ids: fake tensors have no values to sort by."""
        assert {hidden.device, ids.device, weights.device} == {torch.device(part.device)}
        seen.append(str(part.device))
        if isinstance(part, KExpertsTorch):
            assert part.down.device == part.slots.device == part.device
            _ = part.slots[ids]
            return sum(part._expert(e, hidden) for e in range(len(part.down)))
        return torch.empty_like(hidden)

    monkeypatch.setattr(hot_experts, "some", lambda mask: True)
    for operator in (KExpertsTorch, KExpertsCPU):
        monkeypatch.setattr(operator, "forward", product)
    monkeypatch.setattr(KExpertsCPU, "load", lambda self, w=None: None)
    with fake_devices():
        names = [f"{KEY}.gate_up_proj", f"{KEY}.down_proj"]
        weights = DictWeights({name: torch.empty(model.get_parameter(name).shape) for name in names})
        module = KTransformersExperts(
            KEY, weights, None, model.get_submodule(KEY), **CPU, gpu_experts=spec, gpu_device="cuda:0", out_device=out
        )
        module.load()
        hidden = torch.empty(5, 64, device=hidden_on)
        ids, w = torch.zeros(5, 3, dtype=torch.int64, device=hidden_on), torch.empty(5, 3, device=hidden_on)
        result = module(hidden, ids, w)
    assert result.device == torch.device(out or hidden_on) and result.shape == (5, 64)
    assert seen == (["cuda:0"] if spec == 8 else ["cuda:0", "cpu"])
    assert module.split.hot.gate_up.device == torch.device("cuda:0")


def test_no_rule_without_gpu_experts_splits_anything(tmp_path):
    model = tiny_model("qwen3_moe")
    loaded_model = optimize_and_load(meta_model(model.config), rules(None), save(model, tmp_path), progress=False)
    assert splits(loaded_model) == [None] * 3
