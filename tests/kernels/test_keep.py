"""Norms, rotary positions and the cache in one launch, in Triton's interpreter and by the reference, against its parts."""

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import cache, keep, rotary
from ktransformers.kernels.mla_decode import numbers, row_bytes
from tests.kernels.paged import assert_close
from tests.kernels.test_rotary import angles, turned


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def way(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")


SLOTS = [64, -1, 3, 192]
"""Of four tokens two have a place in three pages."""


def kept_only(made, before, places):
    """Whether rows of pages [pages, 64, ..] other than `places` are as before."""
    others = torch.ones(made.shape[0] * 64, dtype=torch.bool)
    others[places] = False
    return torch.equal(made.flatten(0, 1)[others], before.flatten(0, 1)[others])


@pytest.mark.parametrize("pairs", rotary.PAIRS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("size, half, value_size", [(32, 16, 32), (24, 9, 40)])
def test_keys_and_values(pairs, normed, size, half, value_size):
    """Views of one product, a table of angles by positions; tokens without a slot are not kept, but their queries turn."""
    rows = torch.randn(4, 5 * size + 2 * value_size)
    q, k, v = rows.split([3 * size, 2 * size, 2 * value_size], 1)
    q, k, v = q.unflatten(1, (3, size)), k.unflatten(1, (2, size)), v.unflatten(1, (2, value_size))
    norms = [torch.randn(size), torch.randn(size)] if normed else [None, None]
    (cos, sin), positions = angles(9, half), torch.tensor([8, 0, 5, 1])
    x = [torch.nn.functional.rms_norm(x.double(), (size,), w.double(), 1e-6) if normed else x for x, w in zip((q, k), norms, strict=True)]
    expected = [turned(x, cos[positions], sin[positions], pairs) for x in x]
    before_k, before_v = k.clone(), v.clone()
    to_keys, to_values = torch.full((3, 64, 2, size), -7.0), torch.full((3, 64, 2, value_size), -7.0)
    before = to_keys.clone(), to_values.clone()
    how = {"positions": positions, "pairs": pairs, "q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6}
    keep.keep(q, k, v, cos, sin, torch.tensor(SLOTS), to_keys, to_values, **how)
    assert_close(q, expected[0])
    assert torch.equal(k, before_k) and torch.equal(v, before_v)
    for token, slot in ((0, 64), (2, 3)):
        assert_close(to_keys.flatten(0, 1)[slot], expected[1][token])
        assert torch.equal(to_values.flatten(0, 1)[slot], v[token])
    assert kept_only(to_keys, before[0], [64, 3]) and kept_only(to_values, before[1], [64, 3])


@pytest.mark.parametrize("pairs", rotary.PAIRS)
@pytest.mark.parametrize("in_place, normed", [(True, False), (False, True)])
def test_latents(pairs, in_place, normed):
    """Rotary parts at the ends of queries and of one product's rows; the end of absorbed queries as their goal."""
    rank, rope = 48, 16
    queries, rows, absorbed = torch.randn(4, 3, 24 + rope), torch.randn(4, rank + rope), torch.zeros(4, 3, rank + rope)
    q, (latents, part) = queries[..., 24:], rows.split([rank, rope], 1)
    (cos, sin), weight = angles(4, rope // 2), torch.randn(rank) if normed else None
    expected = turned(q, cos, sin, pairs), turned(part[:, None], cos, sin, pairs)[:, 0]
    normal = torch.nn.functional.rms_norm(latents.double(), (rank,), weight.double(), 1e-6) if normed else latents
    pages, before_q, before_rows = torch.full((3, 64, rank + rope), -7.0), queries.clone(), rows.clone()
    before, to_q = pages.clone(), None if in_place else absorbed[..., rank:]
    keep.keep_latents(q, latents, part, cos, sin, torch.tensor(SLOTS), pages, to_q=to_q, weight=weight, eps=1e-6, pairs=pairs)
    assert_close(q if in_place else to_q, expected[0])
    assert torch.equal(queries[..., :24], before_q[..., :24]) and torch.equal(rows, before_rows)
    assert in_place or torch.equal(queries, before_q)
    assert not absorbed[..., :rank].any()
    for token, slot in ((0, 64), (2, 3)):
        row = pages.flatten(0, 1)[slot]
        assert_close(row[:rank], normal[token])
        assert_close(row[rank:], expected[1][token])
    assert kept_only(pages, before, [64, 3])


@pytest.mark.parametrize("rank, group", [(64, 16), (48, 48)])
@pytest.mark.parametrize("normed", [False, True])
def test_latents_in_fp8(rank, group, normed):
    """The bytes that `append_latents` keeps of normed latents and turned rotary parts, but for a code's rounding."""
    q, latents, part = torch.randn(4, 3, 16), torch.randn(4, rank), torch.randn(4, 16)
    (cos, sin), weight, slots = angles(4, 8), torch.rand(rank) + 0.5 if normed else None, torch.tensor(SLOTS)
    normal = torch.nn.functional.rms_norm(latents, (rank,), weight, 1e-6) if normed else latents
    key = turned(part[:, None], cos, sin, "halves")[:, 0].float()
    made, expected = (torch.full((3, 64, row_bytes(rank, 16, group)), 7, dtype=torch.uint8) for _ in range(2))
    before = made.clone()
    cache.append_latents(normal, key, slots, expected, group)
    keep.keep_latents(q, latents, part, cos, sin, slots, made, weight=weight, eps=1e-6, group=group)
    assert kept_only(made, before, [64, 3])
    for slot in (64, 3):
        rows = [pages.flatten(0, 1)[slot] for pages in (made, expected)]
        assert (rows[0][:rank] == rows[1][:rank]).float().mean() > 0.9  # scales may differ by their last bit
        assert_close(*(numbers(row, rank, 16, group) for row in rows), 2**-4)
    with pytest.raises(UnsupportedError, match="Cache: found latents"):
        keep.keep_latents(q, latents, part, cos, sin, slots, made[..., :-16], group=group)


def test_no_tokens():
    q, k, slots, pages = torch.zeros(0, 2, 16), torch.zeros(0, 1, 16), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 64, 1, 16)
    keep.keep(q, k, k, *angles(0, 8), slots, pages, pages)
    keep.keep_latents(q, torch.zeros(0, 32), k[:, 0], *angles(0, 8), slots, torch.zeros(1, 64, 48))


def test_what_does_not_fit_is_refused():
    q, k, (cos, sin), slots = torch.zeros(2, 3, 16), torch.zeros(2, 1, 16), angles(2, 8), cache.slots_of(*[torch.zeros(2, dtype=torch.int32)[:, None], torch.ones(2, dtype=torch.int32)], 1)
    pages, latents = torch.zeros(4, 64, 1, 16), torch.zeros(2, 32)
    with pytest.raises(UnsupportedError, match="Rotary: found"):
        keep.keep(q[:1], k, k, cos, sin, slots, pages, pages)
    with pytest.raises(UnsupportedError, match="Cache: found"):
        keep.keep(q, k, k, cos, sin, slots, pages[..., :8], pages)
    rows = torch.zeros(4, 64, 48)
    with pytest.raises(UnsupportedError, match="Cache: found"):
        keep.keep_latents(q, latents, k[:, 0], cos, sin, slots, rows[..., :40])
    for wrong in ({"to_q": q[:1]}, {"to_q": q.half()}, {"weight": torch.zeros(16)}):
        with pytest.raises(UnsupportedError, match="Latents: found"):
            keep.keep_latents(q, latents, k[:, 0], cos, sin, slots, rows, **wrong)
