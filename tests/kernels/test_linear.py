"""Products with many rows in Triton's interpreter, against the reference: the dot, numbers made for torch.mm, the choice."""

import pytest
import torch

from ktransformers.errors import WeightError
from ktransformers.kernels import dequantize as dense
from ktransformers.kernels import dot as d
from ktransformers.kernels import gemv as g
from ktransformers.kernels import linear as l
from ktransformers.kernels import words as w
from tests.kernels.test_gemv import assert_close, inputs
from tests.kernels.weights import GGUF, SCALED, random_weight


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
def test_every_type_by_the_dot(interpreter, name):
    words = w.from_packed(random_weight(name, 40, 512), "cpu")
    x = inputs(5, 512, torch.float32)
    assert_close(d.dot(x, words), g.reference(x, words))


@pytest.mark.parametrize("rows, n, k", [(1, 16, 32), (17, 24, 96), (64, 72, 1056), (70, 40, 160)])
def test_rows_and_sizes_of_the_dot(interpreter, rows, n, k):
    """N off the block, K of one group and off the tile, rows off the tile; a view as x, a bias."""
    words = w.from_packed(random_weight("Q8_0", n, k), "cpu")
    x, bias = inputs(rows, k + 8, torch.float32)[:, :k], torch.randn(n)
    assert_close(d.dot(x, words, bias), g.reference(x, words, bias))


@pytest.mark.parametrize("name", GGUF)
def test_nasty_weights_by_the_dot(interpreter, name):
    words = w.from_packed(random_weight(name, 33, 256, seed=7, nasty=True), "cpu")
    x = inputs(3, 256, torch.float32)
    assert_close(d.dot(x, words), g.reference(x, words))


@pytest.mark.parametrize("name", [*GGUF, *SCALED])
def test_numbers_made_on_the_gpu_have_the_same_bits(interpreter, name):
    words = w.from_packed(random_weight(name, 40, 512), "cpu")
    out = torch.full((512, 16), float("nan"))
    dense.dequantize_into(out, words, 16)
    assert torch.equal(out, w.dequantize(words)[16:32].T)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_all_ways_agree_and_allocate_nothing(interpreter, rows, monkeypatch):
    """Thresholds lowered, so that small sizes take every way; three dimensions, a bias, buffers full of NaN."""
    monkeypatch.setattr(l, "DOT_ROWS", 4)
    monkeypatch.setattr(l, "DENSE_AT_ONCE", 512 * 32)
    words = w.from_packed(random_weight("GPTQ_ORDER", 40, 512), "cpu")
    x, bias, out = inputs(rows, 512, torch.float32).view(rows, 1, 512), torch.randn(40), torch.zeros(rows, 1, 40)
    expected = g.reference(x.view(rows, 512), words, bias)
    assert_close(l.linear(x, words, bias).view(rows, 40), expected)
    workspace = torch.full((l.workspace_size(words, rows, x.dtype),), float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert l.linear(x, words, bias, out, workspace) is out
    assert_close(out.view(rows, 40), expected)


def test_without_a_gpu_the_reference_computes():
    words = w.from_packed(random_weight("Q6_K", 24, 256), "cpu")
    x = inputs(300, 256)
    assert torch.equal(l.linear(x, words), g.reference(x, words))
    with pytest.raises(WeightError, match="A workspace of 3"):
        g.sums_of(torch.zeros(3), (4,), x.device)


def test_no_rows(interpreter):
    assert l.linear(torch.zeros(2, 0, 64), w.from_packed(random_weight("Q4_0", 16, 64), "cpu")).shape == (2, 0, 16)
