"""Decoder layers in one call, against their parts one by one."""

import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native import Choice
from ktransformers.operators.routing import Routing
from tests.native import test_delta_net
from tests.native.blocks import random_weight
from tests.native.test_self_attention import HIDDEN, PLAIN, Case, cut, hidden_of, positions_of

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


def experts(seed, count, inner=64, fmt="F32"):
    import numpy as np

    r = np.random.default_rng(seed)
    stacks = [[random_weight(r, fmt, a, b) for _ in range(count)]
              for a, b in ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner))]  # fmt: skip
    return native.Experts(*stacks, name="experts")


def layer(seed, dense=False, factor=1.0, fmt="F32", **form):
    """A layer, and its parts. `form`: as `joinings` takes it."""
    attention = Case(fmt=fmt, norms=True, seed=seed)
    g = torch.Generator().manual_seed(seed)
    if dense:
        mlp = experts(seed, 1, fmt=fmt)
    else:
        routing = Routing(Choice(2, "softmax"), torch.randn(5, HIDDEN, generator=g) / 8)
        mlp = native.Block(routing.in_c("router"), experts(seed, 5, fmt=fmt), name="block")
    parallel = form.pop("parallel", False)
    first, second = joinings(g, factor, **form)
    made = native.Layer(attention.made, mlp, first, second, parallel, name=f"layer {seed}")
    return made, attention, mlp, first, second, parallel


def joinings(g, factor, before=True, after=False, centered=False, keep=1.0):
    for eps in (1e-6, 1e-5):
        norms = [native.Norm(torch.rand(HIDDEN, generator=g) + 0.5, eps, centered) if there else None
                 for there in (before, after)]  # fmt: skip
        yield native.Joining(*norms, keep, factor)


def normed(x, norm):
    if norm is None:
        return x
    x = x - x.mean(-1, keepdim=True) if norm.centered else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def joined(x, how, gave):
    return how.keep * x + how.factor * normed(gave.view(x.shape), how.after)


def one_by_one(parts, x, pages, positions):
    for (_, attention, mlp, first, second, parallel), held in zip(parts, pages, strict=True):
        given, gave = x, attention.made.forward(normed(x, first.before), held, positions)
        x = joined(x, first, gave)
        rows = normed(given if parallel else x, second.before).flatten(0, 1)
        if isinstance(mlp, native.Experts):
            zeros = torch.zeros(len(rows), 1, dtype=torch.int64)
            out = mlp.forward(rows, zeros, torch.ones(len(rows), 1))
        else:
            out = mlp.forward(rows)
        x = joined(x, second, out)
    return x


@pytest.mark.parametrize("tokens", [(1, 1, 1), (7, 1), (70, 3, 1)])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_layers_in_one_call_give_what_their_parts_give(tokens, factor):
    parts = [layer(0, dense=True, factor=factor), layer(1, factor=factor), layer(2, factor=factor)]
    stack = native.Layers([part[0] for part in parts])
    pages, theirs = ([part[1].pages() for part in parts] for _ in range(2))
    hidden, positions, at = hidden_of(2, sum(tokens)), positions_of(PLAIN, 1, sum(tokens)), 0
    for count in tokens:
        piece, place = hidden[:, at : at + count], cut(positions, at, at + count)
        out = stack.forward(piece, pages, [place])
        torch.testing.assert_close(out, one_by_one(parts, piece, theirs, place), rtol=1e-4, atol=1e-5)
        at += count
    assert [held.lengths for held in pages] == [[at, at]] * 3


@pytest.mark.parametrize("form", [
    {"after": True}, {"before": False, "after": True}, {"before": False}, {"parallel": True}, {"centered": True},
    {"keep": 0.6}, {"after": True, "centered": True, "keep": 0.6, "parallel": True},
], ids=str)  # fmt: skip
def test_layers_of_any_form(form):
    """Norms before and after, centered or not, a sum that is scaled, an MLP beside the attention; with a plain layer
    before and after."""
    parts = [layer(0), layer(1, factor=0.3, **form), layer(2, dense=True, **form), layer(3)]
    stack = native.Layers([part[0] for part in parts])
    pages, theirs = ([part[1].pages() for part in parts] for _ in range(2))
    hidden, positions = hidden_of(2, 8), positions_of(PLAIN, 1, 8)
    for begin, end in ((0, 7), (7, 8)):
        piece, place = hidden[:, begin:end], cut(positions, begin, end)
        expected = one_by_one(parts, piece, theirs, place)
        torch.testing.assert_close(stack.forward(piece, pages, [place]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centered", [False, True])
def test_the_norm_after_the_last(centered):
    parts, norm = [layer(0)], native.Norm(torch.rand(HIDDEN) + 0.5, 1e-6, centered)
    out = native.Layers([parts[0][0]], norm=norm).forward(hidden_of(1, 3), [parts[0][1].pages()])
    expected = normed(one_by_one(parts, hidden_of(1, 3), [parts[0][1].pages()], None), norm)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"parallel": True, "after": True}], ids=str)
def test_more_tokens_than_a_piece_of_the_second_half(form):
    parts = [layer(1, **form)]
    hidden, positions = hidden_of(1, 2100), positions_of(PLAIN, 1, 2100)
    out = native.Layers([parts[0][0]]).forward(hidden, [parts[0][1].pages()], [positions])
    expected = one_by_one(parts, hidden, [parts[0][1].pages()], positions)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


class Held:
    def __init__(self, conv, states):
        self.kept = [conv, states]

    def tensors(self):
        return self.kept


@pytest.mark.parametrize("form", [{}, {"after": True, "keep": 0.6}, {"parallel": True}], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_delta_net_in_the_place_of_attention(form, first):
    """Steps of one token through layers of both kinds; tensors that moved in between are found."""
    net, g = test_delta_net.Case(), torch.Generator().manual_seed(5)
    assert net.made.hidden == HIDDEN
    parallel = form.get("parallel", False)
    joining = list(joinings(g, 0.7, **{k: v for k, v in form.items() if k != "parallel"}))
    mlp = experts(4, 1)
    made = native.Layer(net.made, mlp, *joining, parallel, name="net")
    other = layer(1, dense=True)
    pages, theirs = other[1].pages(), other[1].pages()
    held = Held(*net.kept(2))
    kept = [x.clone() for x in held.kept]
    stack = native.Layers([made, other[0]] if first else [other[0], made], [0, 1])
    for token in range(3):
        x, place = hidden_of(2, 3)[:, token : token + 1], cut(positions_of(PLAIN, 1, 3), token, token + 1)
        found = stack.forward(x, [held, pages] if first else [pages, held], [None, place] if first else [place, None])
        if not first:
            x = one_by_one([other], x, [theirs], place)
        given, y = x, joined(x, joining[0], net.made.forward(normed(x, joining[0].before), *kept))
        rows = normed(given if parallel else y, joining[1].before).flatten(0, 1)
        x = joined(y, joining[1], mlp.forward(rows, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)))
        expected = one_by_one([other], x, [theirs], place) if first else x
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for a, b in zip(held.kept, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        held.kept = [a.clone() for a in held.kept]
    before = [a.clone() for a in held.kept]
    for x, kept in ((hidden_of(2, 2), held), (hidden_of(1, 1), held), (hidden_of(2, 1), Held(*net.kept(3)))):
        with pytest.raises(NativeError, match="found"):
            native.Layers([made]).forward(x, [kept])
    assert all(map(torch.equal, held.kept, before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_between_layers_the_sum_is_fp32(dtype):
    """Closer to the sum in fp32 than layer by layer in 16 bits."""
    parts = [layer(i) for i in range(6)]
    hidden, positions = hidden_of(1, 3).to(dtype), positions_of(PLAIN, 1, 3)
    exact = one_by_one(parts, hidden.float(), [part[1].pages() for part in parts], positions)

    def wrong(step):
        x = hidden
        for some in step:
            made = native.Layers([part[0] for part in some])
            x = made.forward(x, [part[1].pages() for part in some], [positions])
        assert x.dtype == dtype
        return (x.float() - exact).norm() / exact.norm()

    assert wrong([parts]) < wrong([[part] for part in parts]) < 0.03


def test_bits_do_not_depend_on_threads():
    parts = [layer(0, dense=True, fmt="Q8_0", after=True, parallel=True), layer(1, fmt="Q8_0")]
    stack, found = native.Layers([part[0] for part in parts]), []
    try:
        for count in (1, 2, 3):
            native.set_threads(count)
            for tokens in (1, 30):
                pages = [part[1].pages() for part in parts]
                found.append(stack.forward(hidden_of(2, tokens), pages, [positions_of(PLAIN, 1, tokens)]))
    finally:
        native.set_threads(None)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))


def test_what_does_not_fit_is_said_and_no_cache_grows():
    parts = [layer(0), layer(1)]
    stack = native.Layers([part[0] for part in parts])
    pages = [part[1].pages() for part in parts]
    with pytest.raises(NativeError, match="pages of 1 layers"):
        stack.forward(hidden_of(1, 1), pages[:1])
    with pytest.raises(NativeError, match="expected last dimension 96"):
        stack.forward(torch.zeros(1, 1, 32), pages)
    with pytest.raises(NativeError, match="expected at least one"):
        native.Layers([])
    with pytest.raises(NativeError, match="norm"):
        native.Layer(parts[0][1].made, parts[0][2], native.Joining(native.Norm(torch.ones(3), 0.0)), native.Joining())
    assert [held.length for held in pages] == [0, 0]
