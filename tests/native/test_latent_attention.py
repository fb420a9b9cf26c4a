"""Latent attention in one call against its formula in torch in float64: both forms, every instruction set, every kind
of cache, padding, masks, gates; and that threads and NaNs change nothing else."""

from dataclasses import replace

import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from ktransformers.native.latent_attention import LatentShape
from ktransformers.native.pages import Pages
from ktransformers.operators.linear import packed_dense
from ktransformers.quants.blocks import Packed, quant_type
from ktransformers.quants.encode import quantize

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

ISAS = native.isas() if native.available() else []
SHAPE = LatentShape(heads=6, latent=64, plain=40, rotary=32, value_size=24, scale=0.17, q_eps=1e-6, kv_eps=1e-5)
HIDDEN, RANK = 64, 48


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_isa(ISAS[-1])
    native.set_threads(None)
    native.set_exact(False)


def module(shape=SHAPE, rank=RANK, kv_b="f32", bias=False, sinks=False, seed=0, key_norm=False, raw=False):
    """(native call, weights in float64). `raw`: queries are made of their latents before the norm, too."""
    generator = torch.Generator().manual_seed(seed)
    size = shape.plain + shape.rotary + (shape.value_size if shape.gate == "in_q" else 0)
    rows = {
        "q": (shape.heads * size, (rank or HIDDEN) * (2 if raw else 1)),
        "kv_a": (shape.latent + shape.rotary, HIDDEN),
        "kv_b": (shape.heads * (shape.plain + shape.value_size), shape.latent),
        "o": (HIDDEN, shape.heads * shape.value_size),
    }
    if rank:
        rows["q_a"] = (rank, HIDDEN)
    own_gate = shape.gate in ("heads", "elements")
    if own_gate:
        rows["g"] = (shape.heads * (shape.value_size if shape.gate == "elements" else 1), HIDDEN)
    w = {name: torch.randn(size, generator=generator) * size[1] ** -0.5 for name, size in rows.items()}
    packed = {name: packed_dense(weight) for name, weight in w.items()}
    if kv_b == "q8_0":
        kind = quant_type("Q8_0")
        packed["kv_b"] = Packed(quantize(w["kv_b"], kind).view(-1), kind, tuple(w["kv_b"].shape))
        w["kv_b"] = packed["kv_b"].dequantize()
    elif kv_b != "f32":
        w["kv_b"] = w["kv_b"].to({"bf16": torch.bfloat16, "f16": torch.float16}[kv_b])
        packed["kv_b"] = packed_dense(w["kv_b"])
    names = ("q_a" if rank else "q", "kv_a", "o", *(("g",) if own_gate else ()))
    biases = {name: torch.randn(rows[name][0], generator=generator) for name in names} if bias else {}
    norms = {"kv": torch.rand(shape.latent, generator=generator) + 0.5}
    if rank:
        norms["q"] = torch.rand(rank, generator=generator) + 0.5
    if key_norm:
        norms["key"] = torch.rand(shape.rotary, generator=generator) + 0.5
    sinks = torch.randn(shape.heads, generator=generator) if sinks else None
    call = native.LatentAttention(packed, shape, biases, norms, sinks)
    numbers = {f"{k}_bias": v for k, v in biases.items()} | {f"{k}_norm": v for k, v in norms.items()}
    numbers |= {} if sinks is None else {"sinks": sinks}
    return call, {k: v.double() for k, v in (w | numbers).items()}


def turn(x, cos, sin, pairs):
    """x [B, heads, S, R]."""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    a, b = (x[..., :half], x[..., half:]) if pairs == "halves" else (x[..., 0::2], x[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack([a, b], -1).flatten(-2) if pairs == "neighbours" else torch.cat([a, b], -1)


def truth(w, shape, hidden, positions, seen):
    """All tokens at once, in float64; seen bool [B, 1, S, S]."""
    x, (cos, sin) = hidden.double(), (p.double() for p in positions)

    def linear(name, x):
        return x @ w[name].T + w.get(f"{name}_bias", 0.0)

    def norm(x, weight, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    into = x
    if "q_a" in w:
        raw = linear("q_a", x)
        into = torch.cat([norm(raw, w["q_norm"], shape.q_eps), raw], -1)[..., : w["q"].shape[1]]
    q = linear("q", into).view(*x.shape[:2], shape.heads, -1).transpose(1, 2)
    q, gate = q[..., : shape.plain + shape.rotary], q[..., shape.plain + shape.rotary :]
    latent, key = linear("kv_a", x).split([shape.latent, shape.rotary], -1)
    latent = norm(latent, w["kv_norm"], shape.kv_eps)
    both = (latent @ w["kv_b"].T).view(*x.shape[:2], shape.heads, -1).transpose(1, 2)
    keys, values = both.split([shape.plain, shape.value_size], -1)
    key = norm(key, w["key_norm"], shape.key_eps) if "key_norm" in w else key
    q, turned = q.split([shape.plain, shape.rotary], -1)
    scores = q @ keys.transpose(2, 3)
    scores = scores + turn(turned, cos, sin, shape.pairs) @ turn(key[:, None], cos, sin, shape.pairs).transpose(2, 3)
    scores = (scores * shape.scale).masked_fill(~seen, -torch.inf)
    if "sinks" in w:
        scores = torch.cat([scores, w["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    out = (scores.softmax(-1)[..., : x.shape[1]].nan_to_num() @ values).transpose(1, 2).flatten(2)
    if shape.gate:
        gate = gate.transpose(1, 2).flatten(2) if shape.gate == "in_q" else linear("g", x)
        gate = gate.sigmoid() if shape.gate_by == "sigmoid" else torch.nn.functional.softplus(gate)
        out = out * (gate.repeat_interleave(shape.value_size, -1) if shape.gate == "heads" else gate)
    return linear("o", out)


def case(batch=2, tokens=150, seed=1, rotary=32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, tokens, HIDDEN, generator=generator)
    angles = torch.rand(batch, tokens, rotary // 2, generator=generator) * 6
    angles = torch.cat([angles, angles], -1)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    return hidden, (angles.cos(), angles.sin()), seen


def pages_for(shape=SHAPE, kind="f32"):
    return Pages(kind, 1, shape.latent, shape.rotary, joined=True)


def in_pieces(call, pages, hidden, positions, pieces, seen=None):
    out, at = [], 0
    for n in pieces:
        part = slice(at, at + n)
        mask = None if seen is None else seen[:, :, part, : at + n]
        out.append(call.forward(hidden[:, part], pages, tuple(p[:, part] for p in positions), mask))
        at += n
    return torch.cat(out, 1)


def assert_close(found, expected, bound=2e-5):
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    assert error < bound, error


ABSORBED, EXPANDED = [1] * 20 + [2, 3, 5], [150]
"""Absorbed from some cached tokens on; expanded."""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_b", ["f32", "bf16", "f16", "q8_0"])
def test_both_forms_equal_the_formula(isa, kv_b):
    native.set_isa(isa)
    call, w = module(kv_b=kv_b)
    hidden, positions, seen = case()
    expected = truth(w, SHAPE, hidden, positions, seen)
    bound = 2e-2 if kv_b == "q8_0" else 2e-5  # its activations become int8 where keys are expanded
    for pieces in (EXPANDED, [64, 66] + [1] * 20, [100, 1, 2, 3, 44], [1, 149]):
        assert_close(in_pieces(call, pages_for(), hidden, positions, pieces), expected, bound)


@pytest.mark.parametrize("pairs", ["halves", "neighbours", "parted"])
@pytest.mark.parametrize("gate", [None, "heads", "elements"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_rotary_forms_gates_biases_and_sinks(pairs, gate, rank):
    shape = replace(SHAPE, pairs=pairs, gate=gate)
    call, w = module(shape, rank, bias=True, sinks=gate == "heads")
    hidden, positions, seen = case(1, 80)
    expected = truth(w, shape, hidden, positions, seen)
    assert_close(in_pieces(call, pages_for(), hidden, positions, [70, 1, 2, 7]), expected)


@pytest.mark.parametrize("gate", ["heads", "elements", "in_q"])
@pytest.mark.parametrize(("rank", "raw"), [(0, False), (RANK, False), (RANK, True)])
def test_gates_in_queries_norms_of_keys_and_latents_as_they_were(gate, rank, raw):
    shape = replace(SHAPE, pairs="parted", gate=gate, gate_by="softplus" if raw else "sigmoid", key_eps=1e-3)
    call, w = module(shape, rank, key_norm=True, raw=raw)
    hidden, positions, seen = case(2, 80)
    expected = truth(w, shape, hidden, positions, seen)
    assert_close(in_pieces(call, pages_for(), hidden, positions, [70, 1, 2, 7]), expected)


def test_factors_of_queries_are_refused():
    call, _ = module()
    hidden, positions, _ = case(1, 3)
    with pytest.raises(NativeError, match="size"):
        call.forward(hidden, pages_for(), positions, q_factor=torch.ones(1, 3))


def test_no_positions_at_all():
    call, w = module()
    hidden, _, seen = case(1, 40)
    ones = torch.ones(1, 40, 32)
    expected = truth(w, SHAPE, hidden, (ones, 0 * ones), seen)
    pages = pages_for()
    found = [call.forward(part, pages) for part in hidden.split([30, 1, 9], 1)]
    assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("pieces", [[150], [140] + [1] * 10, [60, 60, 30]])
def test_masks_of_padded_sequences(pieces):
    call, w = module()
    hidden, positions, seen = case()
    seen = seen.clone()
    seen[0, :, :, :70] = False
    expected = truth(w, SHAPE, hidden, positions, seen)
    found = in_pieces(call, pages_for(), hidden, positions, pieces, seen)
    assert_close(found[0, 70:], expected[0, 70:])
    assert_close(found[1], expected[1])
    assert found.isfinite().all()


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2e-2), ("f16", 2e-3), ("q8_0", 2e-2)])
def test_every_kind_of_cache(kind, bound):
    call, w = module()
    hidden, positions, seen = case()
    expected = truth(w, SHAPE, hidden, positions, seen)
    for pieces in (EXPANDED, [130] + [1] * 20):
        pages = pages_for(kind=kind)
        assert_close(in_pieces(call, pages, hidden, positions, pieces), expected, bound)
    latent, key = pages.gathered()
    assert latent.shape == (2, 1, 150, 64) and key.shape == (2, 1, 150, 32)


def test_the_cache_holds_what_torch_appends_and_the_other_way():
    call, _ = module()
    hidden, positions, _ = case()
    ours, theirs = pages_for(), pages_for()
    in_pieces(call, ours, hidden, positions, [100])
    theirs.append(*ours.gathered())
    for a, b in zip(ours.gathered(7), theirs.gathered(7), strict=True):
        assert torch.equal(a, b)
    step = (hidden[:, 100:101], tuple(p[:, 100:101] for p in positions))
    assert torch.equal(call.forward(step[0], ours, step[1]), call.forward(step[0], theirs, step[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [6, 70])
def test_threads_change_nothing(dtype, heads):
    call, _ = module(replace(SHAPE, heads=heads), kv_b="bf16")
    hidden, positions, _ = case()
    found = []
    for threads in (1, 2, 5):
        native.set_threads(threads)
        found.append(in_pieces(call, pages_for(), hidden.to(dtype), positions, [120, 1, 2, 27]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bf16_is_near():
    call, w = module(kv_b="bf16")
    hidden, positions, seen = case()
    hidden = hidden.bfloat16()
    expected = truth(w, SHAPE, hidden, positions, seen)
    assert_close(in_pieces(call, pages_for(kind="bf16"), hidden, positions, [120, 1, 29]), expected, 2e-2)


def test_nan_stays_with_those_who_see_it():
    """A NaN in a token reaches that token and later ones of its sequence, none before, and no other sequence."""
    call, w = module()
    hidden, positions, seen = case()
    expected = truth(w, SHAPE, hidden, positions, seen)
    hidden[1, 100, 3] = torch.nan
    for pieces in (EXPANDED, [90] + [1] * 60):
        found = in_pieces(call, pages_for(), hidden, positions, pieces)
        assert_close(found[0], expected[0])
        assert_close(found[1, :100], expected[1, :100])
        assert found[1, 100:].isnan().all()


def test_absurd_shapes_are_refused():
    sizes = {"q": (432, 64), "kv_a": (96, 64), "kv_b": (384, 64), "o": (64, 144), "g": (6, 64)}
    packed = {name: packed_dense(torch.zeros(size)) for name, size in sizes.items()}
    for wrong in ({"latent": 40}, {"rotary": 31}, {"heads": 0}, {"value_size": 23}, {"gate": "in_q"}):
        desc = replace(SHAPE, **wrong)
        with pytest.raises(NativeError):
            native.LatentAttention(packed, desc, {}, {"kv": torch.ones(desc.latent)})
