"""Expert operators: the result of transformers' experts on every allowed input, and clear refusals."""

import copy
import re

import pytest
import torch
from torch import nn

from ktransformers import native, optimize_and_load
from ktransformers.operators import base_operator, experts
from ktransformers.operators.base_operator import InferenceState
from ktransformers.operators.experts import KExpertsCPU, KExpertsTorch, KTransformersExperts
from tests.dict_weights import DictWeights
from tests.tiny import FAMILIES, meta_model, tiny_config, tiny_model

KEY = "model.layers.2.mlp.experts"
CPU = {"generate_device": "cpu", "prefill_device": "cpu"}
BOTH = pytest.mark.parametrize("op", ["KExpertsTorch", "KExpertsCPU"])


def parts(family="qwen3_moe", types=None, dtype=torch.float32):
    """(transformers' experts, the same on meta, weights)."""
    model = tiny_model(family).to(dtype)
    weights = DictWeights(model.state_dict(), types)
    return model.get_submodule(KEY), meta_model(model.config).to(dtype).get_submodule(KEY), weights


def loaded(meta, weights, op, **kwargs):
    module = KTransformersExperts(KEY, weights, None, meta, generate_op=op, **{**CPU, **kwargs})
    module.load()
    return module


def routing(tokens=7, k=3, experts=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 64, dtype=dtype)
    return hidden, torch.randint(0, experts, (tokens, k)), torch.rand(tokens, k)


@BOTH
@pytest.mark.parametrize("family", list(FAMILIES))
def test_experts_equal_transformers(family, op):
    truth, meta, weights = parts(family)
    inputs = routing()
    with torch.no_grad():
        torch.testing.assert_close(loaded(meta, weights, op)(*inputs), truth(*inputs), rtol=1e-5, atol=1e-5)


@BOTH
def test_no_tokens_one_token_and_one_expert_for_all(op):
    truth, meta, weights = parts()
    module = loaded(meta, weights, op)
    with torch.no_grad():
        assert module(*routing(0)).shape == (0, 64)
        for hidden, ids, w in (routing(1), routing(9, 1)):
            torch.testing.assert_close(module(hidden, ids, w), truth(hidden, ids, w), rtol=1e-5, atol=1e-5)
            same = torch.full_like(ids, 5)
            torch.testing.assert_close(module(hidden, same, w), truth(hidden, same, w), rtol=1e-5, atol=1e-5)


@BOTH
def test_the_sentinel_is_skipped_and_a_duplicate_counts_twice(op):
    _, meta, weights = parts()
    module = loaded(meta, weights, op)
    hidden, _, _ = routing(4)
    ids = torch.tensor([[1, 8, 2], [8, 8, 8], [3, 3, -1], [0, 7, 8]])
    w = torch.rand(4, 3)
    with torch.no_grad():
        found = module(hidden, ids, w)
        one = module(hidden[2:3], torch.tensor([[3]]), w[2:3, :2].sum(1, keepdim=True))
        rest = module(hidden[:1], ids[:1, [0, 2]], w[:1, [0, 2]])
    assert torch.equal(found[1], torch.zeros(64))
    torch.testing.assert_close(found[2:3], one)
    torch.testing.assert_close(found[:1], rest)


@BOTH
def test_bf16_in_bf16_out_near_the_fp32_result(op):
    truth, meta, weights = parts(dtype=torch.bfloat16)
    hidden, ids, w = routing(dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = loaded(meta, weights, op)(hidden, ids, w), truth.float()(hidden.float(), ids, w)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_quantized_experts_of_both_operators_agree():
    names = {f"{KEY}.gate_up_proj": "Q8_0", f"{KEY}.down_proj": "Q8_0"}
    _, meta, weights = parts(types=names)
    inputs = routing()
    with torch.no_grad():
        cpu, dense = (loaded(meta, weights, op)(*inputs) for op in ("KExpertsCPU", "KExpertsTorch"))
    assert (cpu - dense).abs().max() < 0.02 * dense.abs().max()  # inputs may be rounded to 8 bits


@BOTH
def test_weights_are_neither_parameters_nor_buffers(op):
    _, meta, weights = parts()
    module = loaded(meta, weights, op)
    assert not module.state_dict() and not list(module.parameters()) and not list(module.children())


def test_unload_and_a_prefill_operator_of_its_own():
    truth, meta, weights = parts()
    module = loaded(meta, weights, "KExpertsCPU", prefill_op="KExpertsTorch")
    inputs = routing()
    assert isinstance(module.active, KExpertsCPU)
    module.set_inference_mode(InferenceState.PREFILL)
    assert isinstance(module.active, KExpertsTorch) and module._inner[InferenceState.GENERATE].experts is None
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), truth(*inputs), rtol=1e-5, atol=1e-5)
    module.unload()
    assert module._inner[InferenceState.PREFILL].down is None


@pytest.mark.parametrize("op", ["KExpertsTorch", "KExpertsCPU"])
def test_gradients_of_hidden_states_and_routing_weights(op, exact):
    truth, meta, weights = parts()
    hidden, ids, w = routing()
    hidden.requires_grad_(), w.requires_grad_()
    expected = torch.autograd.grad(truth(hidden, ids, w).square().sum(), (hidden, w))
    found = torch.autograd.grad(loaded(meta, weights, op)(hidden, ids, w).square().sum(), (hidden, w))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    alone = loaded(meta, weights, op)(hidden.detach(), ids, w).square().sum()
    torch.testing.assert_close(torch.autograd.grad(alone, w)[0], expected[1], rtol=1e-4, atol=1e-4)


def test_obsolete_names_and_backends_are_accepted_with_one_notice():
    _, meta, weights = parts()
    base_operator._told.clear()
    with pytest.warns(UserWarning, match="'MLPCPUExperts' is obsolete, today's is 'KExpertsCPU'"):
        assert isinstance(loaded(meta, weights, "MLPCPUExperts").active, KExpertsCPU)
    with pytest.warns(UserWarning, match="KExpertsMarlin runs on GPUs only"):
        assert isinstance(loaded(meta, weights, "KExpertsMarlin").active, KExpertsCPU)
    with pytest.warns(UserWarning, match="backend 'AMXInt8'"):
        loaded(meta, weights, "KExpertsCPU", backend="AMXInt8")


def test_check_lists_what_does_not_fit(monkeypatch):
    _, meta, weights = parts()

    def check(module=meta, **kwargs):
        return KTransformersExperts.check(KEY, module, {**CPU, **kwargs}, weights)

    assert check() == check(generate_op="MLPCPUExperts", prefill_op="None") == []
    problems = check(generate_op="KExpertsCPUU", prefill_op="KExpertTorch", backend="llamafil")
    assert len(problems) == 3 and all("did you mean" in problem for problem in problems)
    assert "set generate_device: cpu" in check(generate_op="KExpertsCPU", generate_device="cuda:0")[0]
    assert check(generate_op="MLPCUDAExperts", generate_device="cuda:0") == []  # computed by torch there
    assert "found Linear" in check(nn.Linear(2, 2))[0]
    monkeypatch.setattr(experts.native, "SUPPORTED_TYPES", frozenset({"Q4_K"}))
    assert check()[0].startswith("generate_op: the C library does not compute F32")
    monkeypatch.setattr(experts.native, "available", lambda: False)
    assert experts.native.NOT_BUILT in check()[0] and check(generate_op="KExpertsTorch") == []


def test_other_layouts_are_refused_by_name():
    module = copy.deepcopy(parts()[1])
    module.down_proj = nn.Parameter(torch.empty(*module.down_proj.shape[:2], 7, device="meta"))
    (problem,) = KTransformersExperts.check(KEY, module, CPU)
    assert re.search("gate_up_proj", problem) and type(module).__name__ in problem


def test_experts_that_pass_their_input_on_cost_nothing_and_count():
    """LongCat-Flash: ids behind the last real expert."""
    _, meta, weights = parts()
    operator = loaded(meta, weights, "KExpertsCPU")
    operator.idle, (hidden, ids, w) = 2, routing()
    real = operator(hidden, ids, w)
    ids, w = torch.cat([ids, torch.full_like(ids[:, :1], operator.n_experts + 1)], 1), torch.cat([w, w[:, :1]], 1)
    torch.testing.assert_close(operator(hidden, ids, w), real + hidden * w[:, -1:])


def test_rows_for_each_expert_in_turn():
    """Llama-4's block passes [E*T, H] alone, with zeros where an expert was not chosen."""
    _, meta, weights = parts()
    operator, hidden = loaded(meta, weights, "KExpertsCPU"), routing()[0]
    count, n = operator.n_experts, len(hidden)
    rows = hidden.repeat(count, 1).view(count, n, -1).clone()
    rows[1], rows[2, : n // 2] = 0, 0
    expected = torch.stack([operator(x, torch.full((n, 1), e), torch.ones(n, 1)) for e, x in enumerate(rows)])
    torch.testing.assert_close(operator(rows.flatten(0, 1)), expected.flatten(0, 1))


def test_a_gating_of_its_own_is_for_the_torch_operator():
    _, meta, weights = parts()

    class Odd(type(meta)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    config = tiny_config("qwen3_moe")
    config._experts_implementation = "batched_mm"  # which asks the class how to gate
    odd = Odd(config)
    (problem,) = KTransformersExperts.check(KEY, odd, CPU)
    assert "their own gating (_apply_gate); use KExpertsTorch" in problem
    assert KTransformersExperts.check(KEY, odd, {**CPU, "generate_op": "KExpertsTorch"}) == []
    with torch.no_grad():
        for name, tensor in odd.named_parameters():
            tensor.copy_(weights.tensor(f"{KEY}.{name}"))
        found, expected = loaded(odd, weights, "KExpertsTorch")(*routing()), odd(*routing())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


METHODS = pytest.mark.parametrize("word", ["backend", "method"])


@METHODS
def test_a_method_is_checked_against_the_checkpoint(word):
    """The name of what is there is accepted, any other is refused with what was found; without weights, known names."""
    names = {f"{KEY}.gate_up_proj": "Q8_0", f"{KEY}.down_proj": "Q8_0"}
    _, meta, gguf = parts(types=names)
    _, bf16_meta, bf16 = parts(dtype=torch.bfloat16)

    def check(method, module=meta, weights=gguf):
        return KTransformersExperts.check(KEY, module, {**CPU, word: method}, weights)

    assert check("LLAMAFILE") == check("llamafile") == check("AMXInt8") == check("BF16", bf16_meta, bf16) == []
    (problem,) = check("FP8")
    assert problem == (
        f"{word}: FP8 asks for experts stored so, found LLAMAFILE (Q8_0); name what is there, or leave it out: the "
        "checkpoint decides"
    )
    assert "found BF16 (BF16)" in check("LLAMAFILE", bf16_meta, bf16)[0]
    for name in experts.METHODS:
        assert check(name, weights=None) == []
    assert "did you mean 'GPTQ_INT4'?" in check("GPTQINT4", weights=None)[0]
    KTransformersExperts(KEY, bf16, None, bf16_meta, **CPU, **{word: "BF16"}).load()


def test_float64_is_refused_before_loading():
    _, meta, weights = parts()
    meta = meta.to(torch.float64)
    for source in (weights, None):
        (problem,) = KTransformersExperts.check(KEY, meta, {"generate_op": "KExpertsCPU", **CPU}, source)
        assert "does not compute float64" in problem and "use KExpertsTorch" in problem
    assert KTransformersExperts.check(KEY, meta, {"generate_op": "KExpertsTorch", **CPU}, weights) == []


@pytest.mark.parametrize("threads", [[2], [1, 1]], ids=str)
def test_weights_are_placed_where_there_are_several_numa_nodes(checkpoint, monkeypatch, threads):
    reference, folder = checkpoint("qwen3_moe")
    placed = []
    monkeypatch.setattr(native, "nodes", lambda: threads)
    monkeypatch.setattr(native.Experts, "place", lambda self: placed.append(self.name))
    optimize_and_load(meta_model(reference.config), "MoE", folder, devices={"cuda": "cpu"}, progress=False)
    expected = [f"model.layers.{i}.mlp.experts" for i in range(3)] if len(threads) > 1 else []
    assert placed == expected
