"""GQA decode over pages: the reference, and the kernel in Triton's interpreter, against attention without pages."""

import math

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import context as c
from ktransformers.kernels import gqa_decode as g
from ktransformers.kernels.context import Context
from tests.kernels.paged import LENGTHS, SHORT, assert_close, cache_of, int32, plain, sequences_of, table_of


def make(lengths, heads, kv_heads, size, value_size, tokens=1, seed=0, **options):
    """Arguments of `gqa_decode`, and what comes out without pages."""
    keys, values = sequences_of(lengths, kv_heads, size, seed=seed), sequences_of(lengths, kv_heads, value_size, seed=seed + 1)
    table, pages = table_of(lengths)
    q = torch.randn(len(lengths), tokens, heads, size, generator=torch.Generator().manual_seed(seed + 2))
    options = {"scale": size**-0.5, **options}
    expected = torch.stack([plain(q[b], k, v, **options) for b, (k, v) in enumerate(zip(keys, values, strict=True))])
    context = Context(table, int32(lengths))
    return (q, cache_of(keys, table, pages), cache_of(values, table, pages), context, g.Scores(**options)), expected


@pytest.fixture
def shares(monkeypatch):
    """Sets how many shares a context is cut into, of 16 tokens at least, and how large a tile is."""
    monkeypatch.setattr(c, "LEAST_TOKENS", 16)

    def use(count, tiles=None):
        monkeypatch.setattr(c, "shares_of", lambda *_, **__: count)
        if tiles is not None:
            monkeypatch.setattr(g, "tiles_for", lambda *_: tiles)

    return use


SINKS = torch.tensor([0.5, -math.inf, 3.0, -2.0, 0.0, 1.0])

OPTIONS = {
    "plain": {}, "window": {"window": 10}, "window of one": {"window": 1}, "window over pages": {"window": 100},
    "sinks": {"sinks": SINKS}, "cap": {"cap": 0.7}, "scale": {"scale": 0.01},
    "all": {"window": 70, "sinks": SINKS, "cap": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_attention(name):
    options = OPTIONS[name]
    args, expected = make(SHORT, 6, 2, 24, 40, tokens=2, **options)
    assert_close(g.gqa_decode(*args), expected)


@pytest.mark.parametrize("name, count", [*((name, 3) for name in OPTIONS), ("sinks", 1), ("all", 1)])
def test_options(interpreter, shares, name, count):
    shares(count, c.Tiles(16, 32, 1, 1))
    options = OPTIONS[name]
    args, expected = make(SHORT, 6, 2, 16, 16, **options)
    made = g.gqa_decode(*args)
    assert_close(made, expected)
    assert torch.equal(made, g.gqa_decode(*args))


@pytest.mark.parametrize("count", [1, 9])
def test_lengths_pages_and_shares(interpreter, shares, count):
    """Ragged lengths, most shares of most sequences empty."""
    shares(count)
    args, expected = make(LENGTHS, 4, 2, 16, 16)
    assert_close(g.gqa_decode(*args), expected)


@pytest.mark.parametrize("heads, kv_heads, size, value_size", [(4, 4, 16, 16), (20, 1, 80, 80), (34, 2, 24, 16), (8, 1, 128, 256)])
def test_heads_and_sizes(interpreter, heads, kv_heads, size, value_size):
    """A head each, one for all, groups that are no multiple of the block; sizes off the powers of 2, values of another."""
    args, expected = make([130, 5], heads, kv_heads, size, value_size)
    assert_close(g.gqa_decode(*args), expected)


@pytest.mark.parametrize("tokens", [2, 19])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"sinks": SINKS[:4]}])
def test_several_new_tokens(interpreter, shares, tokens, options):
    """Each sees what is before it, over blocks of rows and shares; the first of a short sequence see nothing."""
    shares(3, c.Tiles(16, 16, 1, 1))
    args, expected = make([tokens - 1, 150], 4, 2, 16, 16, tokens, **options)
    assert_close(g.gqa_decode(*args), expected)


def test_tokens_before_the_start_and_dropped_pages_are_not_read(interpreter, shares):
    """Padding by `starts`, and a window that has left pages behind."""
    for count in (1, 3):
        shares(count)
        (q, keys, values, context, _), _ = make([300, 200], 4, 2, 16, 16)
        table = context.table
        sequences = [sequences_of([300, 200], 2, 16, seed=seed) for seed in (0, 1)]
        starts = [150, 10]
        expected = torch.stack([plain(q[b], sequences[0][b], sequences[1][b], 0.25, window=100, start=starts[b]) for b in range(2)])
        table[0, :3], table[1, 0] = -1, -1
        for cache in (keys, values):
            cache[table[0, 3], :7] = float("nan")  # 192 to 198; the window begins at 200
        assert_close(g.gqa_decode(q, keys, values, Context(table, context.lengths, int32(starts)), g.Scores(0.25, 100)), expected)


def test_pages_of_heads_first_serve_too(interpreter):
    """Strides are free: pages as the CPU's cache has them, [C, 64, D]."""
    (q, keys, values, *rest), expected = make([100], 4, 2, 16, 16)
    keys, values = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (keys, values))
    assert_close(g.gqa_decode(q, keys, values, *rest), expected)


def test_it_allocates_nothing_when_given_its_buffers(interpreter, shares, monkeypatch):
    shares(5)
    (q, *rest), expected = make(SHORT, 6, 2, 16, 16)
    q, out = q[:, 0], torch.full((len(q), 6, 16), float("nan"))
    workspace = torch.full((g.workspace_size(q, *rest),), float("nan"))
    assert workspace.numel() == len(q) * 5 * 6 * 17
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert g.gqa_decode(q, *rest, out=out, workspace=workspace) is out
    assert_close(out, expected[:, 0])
    with pytest.raises(UnsupportedError, match="expected .* float32 in order"):
        g.gqa_decode(q, *rest, out=out, workspace=workspace[1:])


def test_one_share_needs_no_workspace(interpreter, shares):
    shares(1)
    (q, *rest), expected = make([20], 2, 2, 16, 16)
    assert g.workspace_size(q, *rest) == 0
    assert_close(g.gqa_decode(q, *rest), expected)


def test_what_does_not_fit_is_refused():
    (q, keys, values, context, scores), _ = make([10, 10], 6, 2, 16, 16)
    for args in (
        (q, keys[..., :8], values, context), (q, keys, values.half(), context), (q[:, :, :5], keys, values, context),
        (q, keys[:, :32], values[:, :32], context), (q, keys, values, Context(context.table.long(), context.lengths)),
        (q, keys, values, Context(context.table, context.lengths.long())), (torch.zeros(2, 6, 600), keys, values, context),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="GQA decode: found .* expected"):
            g.gqa_decode(*args, scores)
    with pytest.raises(UnsupportedError, match="found sinks"):
        g.gqa_decode(q, keys, values, context, g.Scores(1.0, sinks=torch.zeros(2)))
