"""MLA decode over pages: the reference, and the kernel in Triton's interpreter, against attention without pages."""

import pytest
import torch

from ktransformers.errors import UnsupportedError
from ktransformers.kernels import context as c
from ktransformers.kernels import mla_decode as m
from ktransformers.kernels.context import Context
from tests.kernels.paged import LENGTHS, SHORT, assert_close, cache_of, int32, plain, sequences_of, table_of

SCALE = 0.17


def make(lengths, heads, rank, rope, tokens=1, seed=0):
    """Arguments of `mla_decode`, and what comes out without pages."""
    sequences = sequences_of(lengths, rank + rope, seed=seed)
    table, pages = table_of(lengths)
    q = torch.randn(len(lengths), tokens, heads, rank + rope, generator=torch.Generator().manual_seed(seed + 1))
    expected = torch.stack([
        plain(q[b], rows[:, None], rows[:, None, :rank], SCALE) for b, rows in enumerate(sequences)
    ])  # fmt: skip
    return (q, cache_of(sequences, table, pages), Context(table, int32(lengths)), rank, SCALE), expected


@pytest.fixture
def shares(monkeypatch):
    """Sets how many shares a context is cut into, of 16 tokens at least, and how large a tile is."""
    monkeypatch.setattr(c, "LEAST_TOKENS", 16)

    def use(count, tiles=None):
        monkeypatch.setattr(c, "shares_of", lambda *_: count)
        if tiles is not None:
            monkeypatch.setattr(m, "tiles_for", lambda *_: tiles)

    return use


def test_pages_are_what_the_kernels_take_them_for():
    """They say 64: a kernel has no names of other files."""
    assert c.PAGE == 64


def test_the_reference_is_attention():
    args, expected = make(SHORT, 5, 48, 16, tokens=2)
    assert_close(m.reference(*args), expected)
    assert_close(m.mla_decode(*args), expected)  # off a GPU
    one, expected = make([70], 3, 16, 8)
    assert_close(m.mla_decode(one[0][:, 0], *one[1:]), expected[:, 0])


@pytest.mark.parametrize("lengths, count, tiles", [
    (LENGTHS, 1, c.Tiles(16, 64, 1, 1)), (LENGTHS, 7, c.Tiles(16, 64, 1, 1)), (SHORT, 40, c.Tiles(32, 16, 1, 1)), (SHORT, 2, c.Tiles(16, 32, 1, 1, piece=16)),
])  # fmt: skip
def test_lengths_pages_and_shares(interpreter, shares, lengths, count, tiles):
    """Ragged lengths, most shares of most sequences empty, heads that are no multiple of the block."""
    shares(count, tiles)
    args, expected = make(lengths, 17, 32, 16)
    made = m.mla_decode(*args)
    assert_close(made, expected)
    assert torch.equal(made[0], torch.zeros_like(made[0]))
    assert torch.equal(made, m.mla_decode(*args))


@pytest.mark.parametrize("heads, rank, rope, tokens", [(1, 16, 8, 1), (7, 24, 6, 3), (16, 512, 64, 1), (3, 80, 16, 6)])
def test_sizes_and_new_tokens(interpreter, shares, heads, rank, rope, tokens):
    """Sizes off the powers of 2; queries of several tokens, of which the first may see nothing."""
    shares(2)
    args, expected = make([tokens - 1, 130] if tokens > 1 else [70], heads, rank, rope, tokens)
    assert_close(m.mla_decode(*args), expected)


def test_tokens_before_the_start_are_not_seen(interpreter, shares):
    lengths, starts = [100, 64, 300, 30], [37, 0, 299, 30]
    for count in (1, 3):
        shares(count)
        (q, cache, context, *rest), _ = make(lengths, 4, 32, 16)
        table = context.table
        sequences = sequences_of(lengths, 48)
        expected = torch.stack([plain(q[b], s[:, None], s[:, None, :32], SCALE, start=starts[b]) for b, s in enumerate(sequences)])
        for b, start in enumerate(starts):  # not even read
            for at in range(start):
                cache[table[b, at // 64], at % 64] = float("nan")
            table[b, : start // 64] = -1
        for compute in (m.mla_decode, m.reference):
            assert_close(compute(q, cache, Context(table, context.lengths, int32(starts)), *rest), expected)


@pytest.mark.parametrize("group", [64, 16])
@pytest.mark.parametrize("piece, fp8", [(None, False), (0, False), (0, True), (32, False), (8, True)])
def test_latents_in_fp8(piece, fp8, group, request):
    """One scale for all latents of a token, and one for every 16; bytes as torch's own FP8 has them."""
    if piece is not None:
        request.getfixturevalue("interpreter")
        request.getfixturevalue("shares")(2, c.Tiles(16, 32, 1, 1, piece, fp8))
    lengths, rank, rope = [1, 65, 200], 64, 16
    codes = [torch.randint(0, 256, (n, rank), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)) for n in lengths]
    codes = [torch.where(code & 0x7F == 0x7F, 0x38, code) for code in codes]  # no NaN
    scales = [torch.rand(n, rank // group) * 0.01 for n in lengths]
    rotary = [torch.randn(n, rope).bfloat16() for n in lengths]
    filled = [torch.full((n, -4 * (rank // group) % 16), 0xFF, dtype=torch.uint8) for n in lengths]
    parts = zip(codes, scales, filled, rotary, strict=True)
    rows = [torch.cat([part.view(torch.uint8) for part in row], 1) for row in parts]
    table, pages = table_of(lengths)
    q = torch.randn(3, 1, 5, rank + rope)
    expected = []
    for b in range(3):
        latents = codes[b].view(torch.float8_e4m3fn).double().unflatten(1, (-1, group)) * scales[b][..., None]
        keys = torch.cat([latents.flatten(1), rotary[b].double()], 1)[:, None]
        expected.append(plain(q[b], keys, keys[..., :rank], SCALE))
    made = m.mla_decode(q, cache_of(rows, table, pages), Context(table, int32(lengths)), rank, SCALE, group=group)
    assert_close(made, torch.stack(expected))


def test_lengths_beyond_the_table_are_cut(interpreter):
    """Nothing beyond a table's row is read, whatever the length says."""
    (q, cache, context, *rest), expected = make([128], 2, 16, 16)
    for compute in (m.mla_decode, m.reference):
        assert_close(compute(q, cache, Context(context.table[:, :2], int32([5000])), *rest), expected)
        assert torch.equal(compute(q, cache, Context(context.table, int32([-3])), *rest), torch.zeros(1, 1, 2, 16))


@pytest.mark.parametrize("nasty", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(interpreter, shares, nasty):
    shares(3)
    (q, cache, context, *rest), _ = make([200, 200], 2, 16, 16)
    cache[context.table[0, 1], 5, 3] = nasty
    made = m.mla_decode(q, cache, context, *rest)
    assert not made[0].isfinite().all() and made[1].isfinite().all()


def test_it_allocates_nothing_when_given_its_buffers(interpreter, shares, monkeypatch):
    shares(5)
    (q, *rest), expected = make(SHORT, 4, 32, 16)
    wide = torch.zeros(len(q), 4, 60)
    wide[..., :48] = q[:, 0]
    q, out = wide[..., :48], torch.full((len(q), 4, 32), float("nan"))  # a view, as a product leaves it
    workspace = torch.full((m.workspace_size(q, *rest[:2], 32),), float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: pytest.fail("allocated"))
    assert m.mla_decode(q, *rest, out=out, workspace=workspace) is out
    assert_close(out, expected[:, 0])
    with pytest.raises(UnsupportedError, match="expected .* float32 in order"):
        m.mla_decode(q, *rest, out=out, workspace=workspace[1:])


def test_shares_fill_the_gpu_and_no_more(monkeypatch):
    monkeypatch.setattr(c, "multiprocessors", lambda _: 132)
    device = torch.device("meta")
    assert c.shares_of(device, 8, 32768) == 16
    assert c.shares_of(device, 200, 32768) == 1
    assert c.shares_of(device, 1, 129) == 2
    assert c.shares_of(device, 1, 10**6) == c.MOST_SHARES
    q, cache = torch.empty(1, 128, 576, device="meta"), torch.empty(9, 64, 576, device="meta")
    table, lengths = torch.empty(1, 512, device="meta"), torch.empty(1, device="meta")
    size = lambda longest: m.workspace_size(q, cache, Context(table, lengths, None, longest), 512)  # noqa: E731
    assert size(None) == 16 * 128 * 513 and size(256) == 2 * 128 * 513


def test_what_does_not_fit_is_refused():
    (q, cache, context, rank, scale), _ = make([10, 10], 2, 16, 16)
    table, lengths = context.table, context.lengths
    for args in (
        (q, cache, Context(table.long(), lengths), rank), (q, cache, Context(table[:1], lengths), rank),
        (q, cache, Context(table, lengths[:1]), rank), (q, cache, Context(table, lengths, lengths.long()), rank),
        (q, cache[:, :32], context, rank), (q, cache, context, 32), (q, cache.half(), context, rank),
        (q[..., :20], cache, context, rank), (torch.zeros(2, 2, 640), cache, context, 600),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="MLA decode: found .* expected"):
            m.mla_decode(*args, scale)
    with pytest.raises(UnsupportedError, match="a scale for every 5"):
        m.mla_decode(q, cache, context, rank, scale, group=5)
    with pytest.raises(UnsupportedError, match="found out"):
        m.mla_decode(q, cache, context, rank, scale, out=torch.zeros(2, 1, 2, 15))


def test_no_sequences(interpreter):
    context = Context(torch.zeros(0, 2, dtype=torch.int32), int32([]))
    empty = m.mla_decode(torch.zeros(0, 4, 48), torch.zeros(3, 64, 48), context, 32, 1.0)
    assert empty.shape == (0, 4, 32)
