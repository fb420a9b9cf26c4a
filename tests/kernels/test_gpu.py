"""The kernels and their operators on a GPU, where there is one: make test-gpu."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ktransformers import native, optimize_and_load
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels import compiler
from ktransformers.kernels import dequantize as dense
from ktransformers.kernels import dot as d
from ktransformers.kernels import experts as e
from ktransformers.kernels import gemv as g
from ktransformers.kernels import linear as l
from ktransformers.kernels import words as w
from ktransformers.loaders import ExpertWeights
from ktransformers.native.experts import Glu
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.experts_packed import KExpertsPacked
from ktransformers.operators.host_experts import finish
from ktransformers.operators.linear import KLinearTorch, KTransformersLinear
from ktransformers.operators.linear_packed import KLinearMarlin, KLinearPacked
from tests.dict_weights import DictWeights
from tests.kernels.weights import GGUF, SCALED, random_weight
from tests.tiny import meta_model, random_ids, save, tiny_config, tiny_model

if compiler.triton is None or not torch.cuda.is_available():
    pytest.skip("no Triton, or no GPU", allow_module_level=True)
if compiler.triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=0 has to be in the environment", allow_module_level=True)

GPU = torch.device("cuda", 0)

BF16 = 2e-2
"""Of the largest result: weights and results rounded to bf16, 2^-9 each."""


def assert_close(ours, theirs, tolerance):
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    assert error < tolerance, f"relative error {error:.2e}"


def words_of(name, n=264, k=2048):
    return w.from_packed(random_weight(name, n, k), GPU)


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
def test_weights_made_there_are_those_made_here(name):
    weight = random_weight(name, 264, 512)
    there, here = w.from_packed(weight, GPU), w.from_packed(weight, "cpu")
    assert all(torch.equal(part.cpu(), here.parts[role]) for role, part in there.parts.items())
    out = torch.empty(512, 264, device=GPU)
    dense.dequantize_into(out, there)
    assert torch.equal(out.cpu(), w.dequantize(here).T)


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_gemv(name, rows):
    words = words_of(name)
    x, out = torch.randn(rows, 2048, device=GPU).bfloat16(), torch.empty(rows, 264, device=GPU)
    assert_close(g.gemv(x, words, out=out), g.reference(x.float(), words), 2e-5)
    assert torch.equal(g.gemv(x, words), g.gemv(x, words))


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
@pytest.mark.parametrize("rows", [3, 17, 64])
def test_dot(name, rows):
    words, x = words_of(name), torch.randn(rows, 2048, device=GPU).bfloat16()
    assert_close(d.dot(x, words), g.reference(x, words), BF16)


@pytest.mark.parametrize("rows", [1, 2, 3, 128, 129, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear(rows, dtype):
    words, bias = words_of("Q4_K"), torch.randn(264, device=GPU).to(dtype)
    x = torch.randn(rows, 2048, device=GPU).to(dtype)
    assert_close(l.linear(x, words, bias), g.reference(x, words, bias), BF16)


def experts_of(first, down, hidden=512, width=256, count=16):
    gate, up = ([random_weight(first, width, hidden, seed + i) for i in range(count)] for seed in (0, 100))
    downs = [random_weight(down, hidden, width, 200 + i) for i in range(count)]
    return e.Experts(e.joined(gate, up, GPU), w.from_experts(downs, GPU), Glu())


def routed(tokens, hidden=512, count=16):
    ids = torch.randint(-1, count + 1, (tokens, 4), device=GPU)
    return torch.randn(tokens, hidden, device=GPU).bfloat16(), ids, torch.rand(tokens, 4, device=GPU)


@pytest.mark.parametrize("first, down", [("Q4_K", "Q6_K"), ("MXFP4", "MXFP4"), ("RAWINT4", "Q8_0")])
@pytest.mark.parametrize("tokens", [1, 5, 9, 300])
def test_experts(first, down, tokens):
    experts, args = experts_of(first, down), routed(tokens)
    assert_close(e.forward(experts, *args), e.reference(experts, *args), BF16)


@pytest.mark.parametrize("tokens", [1, 40])
def test_one_graph_serves_any_routing(tokens):
    experts, (x, ids, weights) = experts_of("Q4_K", "Q6_K"), routed(tokens)
    out = torch.empty_like(x)
    workspace = torch.empty(e.workspace_size(experts, tokens, 4, x.dtype), device=GPU)
    run = lambda: e.forward(experts, x, ids, weights, out, workspace)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for change in (lambda: None, lambda: ids.fill_(3), lambda: ids.fill_(-1), lambda: ids.copy_(routed(tokens)[1])):
        change()
        workspace.fill_(float("nan"))
        graph.replay()
        expected = e.reference(experts, x, ids, weights)
        assert float((out.float() - expected.float()).abs().max()) <= BF16 * max(1e-6, float(expected.float().abs().max()))


# --- the operators, on the device as rules name it --------------------------------------------------------------------


class One(DictWeights):
    """A linear layer and a layer of experts, in published bytes."""

    def __init__(self, name, down="Q6_K"):
        gate, up = ([random_weight(name, 256, 512, seed + i) for i in range(16)] for seed in (0, 100))
        self.made = gate, up, [random_weight(down, 512, 256, 200 + i) for i in range(16)]
        self.weight = random_weight(name, 264, 2048)
        dense = [torch.stack([one.dequantize() for one in part]) for part in self.made]
        super().__init__({"a.weight": self.weight.dequantize(), "a.bias": torch.randn(264),
                          "e.gate_up_proj": torch.cat(dense[:2], 1), "e.down_proj": dense[2]})  # fmt: skip

    def packed(self, name):
        return self.weight if name == "a.weight" else super().packed(name)

    def quant_type(self, name):
        return self.weight.type.name if name == "a.weight" else super().quant_type(name)

    def infos(self, name):
        kinds = {"e.gate_up_proj": self.weight.type, "e.down_proj": self.made[2][0].type}
        return [SimpleNamespace(type=kinds[name])] if name in kinds else super().infos(name)

    def experts(self, prefix):
        return ExpertWeights(*self.made)


def on(device, weights, op, *args):
    meta = nn.Linear(2048, 264, device="meta", dtype=torch.bfloat16)
    made = KTransformersLinear("a", weights, None, meta, device, op, device, *args)
    made.load()
    return made


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ4_XS", "MXFP4", "GPTQ_ORDER", "AWQ", "RAWINT4", "FP8", "IQ2_XS"])
def test_linear_operators(name):
    """Named and not; the last type has no packed form: quantized where named, else dense."""
    weights = One("Q4_K")
    weights.weight = random_weight(name, 264, 2048)
    weights.tensors["a.weight"] = weights.weight.dequantize()
    dense = on("cuda", weights, "KLinearTorch")
    for op, kind in (("KLinearMarlin", KLinearMarlin), (None, KLinearTorch if name == "IQ2_XS" else KLinearPacked)):
        packed = on("cuda", weights, op)
        assert type(packed.active) is kind
        for rows in (1, 3, 40, 300):
            x = torch.randn(rows, 2048, device=GPU).bfloat16()
            assert_close(packed(x), dense(x), 0.2 if op and name == "IQ2_XS" else BF16)
            assert packed(x.cpu()).device.type == "cpu"


def experts_module(hidden=512, width=256):
    config = tiny_config("qwen3_moe", hidden_size=hidden, moe_intermediate_size=width, num_experts=16)
    return meta_model(config).bfloat16().model.layers[0].mlp.experts


def experts_on(weights, op, device="cuda", **kwargs):
    where = {"generate_device": device, "prefill_device": device}
    made = KTransformersExperts("e", weights, None, experts_module(), **where, generate_op=op, **kwargs)
    made.load()
    return made


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_expert_operators(tokens):
    weights = One("Q4_K")
    packed, dense, args = experts_on(weights, "KExpertsMarlin"), experts_on(weights, "KExpertsTorch"), routed(tokens)
    assert_close(packed(*args), dense(*args), BF16)


def test_operators_in_one_graph():
    weights = One("Q4_K")
    linear, experts = on("cuda", weights, "KLinearMarlin"), experts_on(weights, "KExpertsMarlin")
    dense, torchs = on("cuda", weights, "KLinearTorch"), experts_on(weights, "KExpertsTorch")
    x, args = torch.randn(1, 2048, device=GPU).bfloat16(), routed(1)
    with torch.inference_mode():
        linear(x), experts(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, of_experts = linear(x), experts(*args)
        for _ in range(3):
            x.normal_(), args[0].normal_(), args[1].random_(0, 16)
            graph.replay()
            assert_close(out, dense(x), BF16)
            assert_close(of_experts, torchs(*args), BF16)


@pytest.mark.skipif(not native.available(), reason="C library not built")
def test_hot_experts_beside_the_cpu_in_one_graph():
    """C computes with activations of 8 bits, hence the tolerance."""
    weights = One("Q4_K")
    module = experts_on(weights, "KExpertsCPU", "cpu", gpu_experts="0-5", gpu_device="cuda")
    assert type(module.split.hot) is KExpertsPacked
    dense, args = experts_on(weights, "KExpertsTorch"), routed(2)
    with torch.inference_mode():
        assert_close(module(*args), dense(*args), 3e-2)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(*args)
        for _ in range(3):
            args[0].normal_(), args[1].random_(0, 16)
            graph.replay()
            finish(GPU)
            assert_close(out, dense(*args), 3e-2)


def test_a_model_by_a_rule(tmp_path):
    """Greedy tokens with packed weights are those with the same weights dense."""
    model = tiny_model("qwen3_moe")
    quantize_folder(save(model, tmp_path / "m"), gguf := tmp_path / "model.gguf", "Q8_0")
    found = []
    for linear, experts in (("KLinearMarlin", "KExpertsMarlin"), ("KLinearTorch", "KExpertsTorch")):
        where = {"generate_device": "cuda", "prefill_device": "cuda"}
        rules = [
            {"match": {"trait": "experts"}, "replace": {"class": "ktransformers.operators.experts.KTransformersExperts", "kwargs": {**where, "generate_op": experts}}, "recursive": False},
            {"match": {"class": "torch.nn.Linear"}, "replace": {"class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": {**where, "generate_op": linear}}},
        ]  # fmt: skip
        ours = optimize_and_load(meta_model(model.config), rules, gguf, default_device="cuda:0", progress=False)
        found.append(ours.generate(random_ids(1, 12).to(GPU), max_new_tokens=16, do_sample=False).tolist())
    assert found[0] == found[1]
