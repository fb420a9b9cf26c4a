"""RMSNorm in Triton's interpreter and by the reference, against torch's own."""

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import norm as n
from tests.kernels.paged import assert_close


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (2, 2048), (2, 3, 64), (5, 2, 80)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_sizes(shape, plus_one):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    expected = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double() + plus_one, 1e-5)
    assert_close(n.rms_norm(x, weight, 1e-5, plus_one=plus_one), expected)
    assert_close(n.rms_norm(x, None, 1e-5), torch.nn.functional.rms_norm(x.double(), shape[-1:], None, 1e-5))


def test_the_residual_becomes_the_sum():
    """Rounded to its type before it is normed, as a model of that type has it."""
    x, residual, weight = torch.randn(3, 96).half(), torch.randn(3, 96).half() * 100, torch.randn(96)
    total = (x.float() + residual.float()).half()
    made = n.rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(residual, total) and made.dtype == torch.float16
    assert_close(made, torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-6), 5e-4)  # half rounds so


def test_the_sum_goes_elsewhere():
    x, residual, weight = torch.randn(3, 96), torch.randn(3, 96), torch.randn(96)
    before, total = residual.clone(), torch.zeros(3, 96)
    made = n.rms_norm(x, weight, 1e-6, residual=residual, total=total)
    assert torch.equal(residual, before) and torch.equal(total, residual + x)
    assert torch.equal(made, n.rms_norm(x, weight, 1e-6, residual=residual))
    for wrong in ({"total": total}, {"residual": residual, "total": torch.zeros(96, 3).T}):
        with pytest.raises(UnsupportedError, match="RMSNorm: found x"):
            n.rms_norm(x, weight, 1e-6, **wrong)


def test_views_and_in_place():
    """Heads in the middle of a product's rows; out is x."""
    rows = torch.randn(4, 10 * 16)
    kept, heads, weight = rows.clone(), rows[:, 32:96].view(4, 4, 16), torch.randn(16)
    expected = torch.nn.functional.rms_norm(heads.double(), (16,), weight.double(), 0.1)
    assert n.rms_norm(heads, weight, 0.1, out=heads) is heads
    assert_close(heads, expected)
    assert torch.equal(rows[:, :32], kept[:, :32]) and torch.equal(rows[:, 96:], kept[:, 96:])


def test_it_allocates_nothing_when_given_out(monkeypatch):
    x, out = torch.randn(2, 32), torch.zeros(2, 32)
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: pytest.fail("allocated"))
    assert n.rms_norm(x, torch.ones(32), 1e-6, out=out) is out


def test_rows_of_nothing_and_longer_ones(monkeypatch):
    assert n.rms_norm(torch.zeros(0, 32), torch.ones(32), 1e-6).shape == (0, 32)
    assert torch.equal(n.rms_norm(torch.zeros(2, 32), torch.ones(32), 1e-6), torch.zeros(2, 32))
    monkeypatch.setattr(n, "MOST", 16)
    assert_close(n.rms_norm(torch.full((2, 32), 3.0), torch.ones(32), 0.0), torch.ones(2, 32))


def test_what_does_not_fit_is_refused():
    x, weight = torch.zeros(2, 32), torch.zeros(32)
    for args, more in (
        ((x, weight[:5]), {}), ((x.T, weight[:2]), {}), ((x, weight), {"residual": x[:1]}), ((x, weight), {"out": x.half()}),
        ((weight, weight), {}),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="RMSNorm: found .* expected"):
            n.rms_norm(*args, 1e-6, **more)
