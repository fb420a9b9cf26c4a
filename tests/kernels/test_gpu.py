"""The kernels on a GPU, where there is one: TRITON_INTERPRET=0 python -m pytest tests/kernels/test_gpu.py"""

import pytest
import torch

from ktransformers.kernels import compiler
from ktransformers.kernels import dequantize as dense
from ktransformers.kernels import dot as d
from ktransformers.kernels import experts as e
from ktransformers.kernels import gemv as g
from ktransformers.kernels import linear as l
from ktransformers.kernels import words as w
from ktransformers.native.experts import Glu
from tests.kernels.weights import GGUF, SCALED, random_weight

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
