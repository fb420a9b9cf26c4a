"""Rotary positions in Triton's interpreter and by the reference, against complex multiplication."""

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import rotary as r
from tests.kernels.paged import assert_close


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")


def angles(count, half, seed=0):
    angle = torch.rand(count, half, generator=torch.Generator().manual_seed(seed)) * 6.3
    return angle.cos(), angle.sin()


def turned(x, cos, sin, pairs):
    """x [T, heads, D] as complex numbers of its pairs, times e^(i angle)."""
    half = cos.shape[-1]
    first, second = x[..., : 2 * half].chunk(2, -1) if pairs == "halves" else (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2])
    made = torch.complex(first.double(), second.double()) * torch.complex(cos.double(), sin.double())[:, None]
    parts = (made.real, made.imag)
    made = torch.stack(parts, -1).flatten(-2) if pairs == "neighbours" else torch.cat(parts, -1)
    return torch.cat([made, x[..., 2 * half :].double()], -1)


@pytest.mark.parametrize("pairs", r.PAIRS)
@pytest.mark.parametrize("size, half", [(32, 16), (64, 8), (80, 40), (24, 9)])
def test_pairs_and_parts(pairs, size, half):
    """Whole heads and their first parts, sizes off the powers of 2, in views of one product."""
    rows = torch.randn(3, 7 * size)
    kept, q, k = rows.clone(), rows[:, : 4 * size].view(3, 4, size), rows[:, 4 * size : 6 * size].view(3, 2, size)
    cos, sin = angles(3, half)
    expected = turned(q, cos, sin, pairs), turned(k, cos, sin, pairs)
    r.rotate(q, k, cos, sin, pairs=pairs)
    assert_close(q, expected[0])
    assert_close(k, expected[1])
    assert torch.equal(rows[:, 6 * size :], kept[:, 6 * size :])
    assert torch.equal(q[..., 2 * half :], kept[:, : 4 * size].view(3, 4, size)[..., 2 * half :])


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_a_table_by_positions(kind):
    q, (cos, sin) = torch.randn(3, 2, 16), angles(9, 8)
    positions = torch.tensor([8, 0, 3], dtype=kind)
    expected = turned(q, cos[positions.long()], sin[positions.long()], "halves")
    r.rotate(q, None, cos, sin, positions=positions)
    assert_close(q, expected)


@pytest.mark.parametrize("pairs", r.PAIRS)
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norm_of_a_head_comes_first(pairs, plus_one):
    q, k, (cos, sin) = torch.randn(2, 3, 40) * 2, torch.randn(2, 1, 40), angles(2, 12)
    norms = torch.randn(40), torch.randn(40)
    normed = (torch.nn.functional.rms_norm(x.double(), (40,), w.double() + plus_one, 1e-6) for x, w in zip((q, k), norms, strict=True))
    expected = [turned(x, cos, sin, pairs) for x in normed]
    r.rotate(q, k, cos, sin, pairs=pairs, q_norm=norms[0], k_norm=norms[1], eps=1e-6, plus_one=plus_one)
    assert_close(q, expected[0])
    assert_close(k, expected[1])


def test_no_tokens():
    r.rotate(torch.zeros(0, 2, 16), torch.zeros(0, 1, 16), *angles(0, 8))


def test_what_does_not_fit_is_refused():
    q, k, (cos, sin) = torch.zeros(2, 3, 16), torch.zeros(2, 1, 16), angles(2, 8)
    for args, more in (
        ((q, k[..., :8], cos, sin), {}), ((q, k[:1], cos, sin), {}), ((q, k.half(), cos, sin), {}), ((q, k, cos[:1], sin[:1]), {}),
        ((q[..., :8], None, cos, sin), {}), ((q, k, cos, sin[:, :4]), {}), ((q, k, cos, sin), {"q_norm": torch.ones(8)}),
        ((q, k, cos, sin), {"positions": torch.zeros(3, dtype=torch.int64)}),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="Rotary: found .* expected"):
            r.rotate(*args, **more)
    with pytest.raises(UnsupportedError, match="did you mean 'halves'"):
        r.rotate(q, k, cos, sin, pairs="halfs")
