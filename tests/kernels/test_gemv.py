"""The GEMV in Triton's interpreter, against its reference: every type, rows, shares, and what nasty weights are made of."""

import pytest
import torch

from ktransformers.errors import WeightError
from ktransformers.kernels import gemv as g
from ktransformers.kernels import layouts
from ktransformers.kernels import words as w
from tests.kernels.weights import GGUF, SCALED, random_weight

EXACT = 1e-5
"""Relative to the largest result. Measured 2e-7 to 4e-6: a sum of (1 + code / 128) x rounds at 2^-17 of a code's share."""


def assert_close(ours, theirs, tolerance=EXACT):
    error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-30))
    assert error < tolerance, f"relative error {error:.2e}"


def inputs(rows, columns, dtype=torch.bfloat16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
def test_every_type(interpreter, name):
    words = w.from_packed(random_weight(name, 40, 256), "cpu")
    x = inputs(2, 256)
    out = torch.empty(2, 40)  # float32: the interpreter cuts what it stores as bf16
    assert_close(g.gemv(x, words, out=out), x.float() @ w.dequantize(words).T)


@pytest.mark.parametrize("rows, n, k", [(1, 40, 32), (2, 16, 96), (3, 136, 544), (4, 24, 160)])
def test_rows_and_sizes(interpreter, rows, n, k):
    """N off the block and the padding, K of one group and off the shares; a view as x, a bias."""
    words = w.from_packed(random_weight("Q8_0", n, k), "cpu")
    x = inputs(rows, k + 8, torch.float32)[:, :k]
    bias = torch.randn(n)
    assert_close(g.gemv(x, words, bias), g.reference(x, words, bias))


@pytest.mark.parametrize("name", GGUF)
def test_nasty_weights(interpreter, name):
    words = w.from_packed(random_weight(name, 33, 256, seed=7, nasty=True), "cpu")
    x = inputs(1, 256, torch.float32)
    assert_close(g.gemv(x, words), g.reference(x, words), 2e-5)


def test_small_and_large_numbers(interpreter):
    """E2M1 is scaled on its way: what x may be is not narrowed by that."""
    words = w.from_packed(random_weight("MXFP4", 16, 64), "cpu")
    for size in (1e-12, 1e6):
        x = inputs(1, 64, torch.float32) * size
        assert_close(g.gemv(x, words), g.reference(x, words))


def test_it_allocates_nothing_when_given_its_buffers(interpreter, monkeypatch):
    words = w.from_packed(random_weight("Q4_K", 24, 1024), "cpu")
    x, out = inputs(2, 1024), torch.empty(2, 24)
    assert g.split_of(words).shares > 1
    workspace = torch.full((g.workspace_size(words, 2),), float("nan"))
    expected = g.reference(x, words, out=torch.empty(2, 24))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert g.gemv(x, words, out=out, workspace=workspace) is out
    assert_close(out, expected)
    with pytest.raises(WeightError, match="expected .* float32 in order"):
        g.gemv(x, words, out=out, workspace=workspace[1:])


def test_what_does_not_fit_is_refused():
    words = w.from_packed(random_weight("Q4_0", 16, 64), "cpu")
    for x in (torch.zeros(5, 64), torch.zeros(1, 32), torch.zeros(64), torch.zeros(64, 2).T):
        with pytest.raises(WeightError, match=r"expected \[1 to 4, 64\]"):
            g.gemv(x, words)


@pytest.mark.parametrize("n, k", [(2048, 4096), (16, 32), (151936, 2048), (7168, 18432), (1408, 96)])
@pytest.mark.parametrize("pairs", [1, 8])
def test_shares_cover_all_columns_once(n, k, pairs, monkeypatch):
    monkeypatch.setattr(g, "multiprocessors", lambda device: 132)
    split = g.split_of(w.empty(layouts.layout_of("Q8_0"), (n, k), "meta"), pairs)
    columns = split.rounds * g.LINES * g.STEP
    assert (split.shares - 1) * columns < k <= split.shares * columns


def test_without_a_gpu_the_reference_computes():
    words = w.from_packed(random_weight("Q6_K", 24, 256), "cpu")
    x = inputs(3, 256)
    assert torch.equal(g.gemv(x, words), (x.float() @ w.dequantize(words).T).bfloat16())
