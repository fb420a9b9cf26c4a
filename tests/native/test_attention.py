"""Attention over a paged cache against torch in float64, on every instruction set of this machine, by both paths.

`threshold` chooses the path: 1 = panels and a GEMM for any number of rows, 1000 = kernels on rows as they lie.
"""

import itertools

import gguf
import numpy as np
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from tests.native.test_kernels import DECODE, PREFILL, rng_for

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")

ISAS = native.isas() if native.available() else []
F32, BF16, F16, Q8_0 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
ROUNDS = ("avx512_bf16", "amx", "amx_emulated", "neon_i8mm")
"""Where queries and weights of a BF16 cache may be rounded to bf16."""


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_panel_threshold(0)
    native.set_isa(ISAS[-1])
    native.set_threads(None)
    native.set_exact(False)


def normal(rng, *shape) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def cached(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as a cache of `dtype`, and its values then."""
    if dtype != Q8_0:
        return x.to(dtype), x.to(dtype).double()
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(x.numpy(), kind)
    return torch.from_numpy(packed), torch.from_numpy(gguf.quants.dequantize(packed, kind)).double()


def visible(b: int, s: int, t: int, window: int, start, mask, lengths) -> torch.Tensor:
    """[B, 1, S, T]: what each query sees."""
    seen = torch.zeros(b, 1, s, t, dtype=torch.bool)
    for i in range(b):
        length = t if lengths is None else lengths[i]
        at, key = torch.arange(length - s, length)[:, None], torch.arange(t)
        one = key <= at
        if window:
            one &= key > at - window
        if mask is not None:
            one = mask[i, 0].clone()
        seen[i, 0] = one & (key < length) & (key >= (0 if start is None else start[i]))
    return seen


def truth(q, k, v, scale=None, window=0, sinks=None, start=None, mask=None, lengths=None) -> torch.Tensor:
    """In float64: [B, S, A, V]."""
    b, a, s, d = q.shape
    group = a // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    seen = visible(b, s, k.shape[2], window, start, mask, lengths)
    scores = (q.double() @ k.transpose(2, 3)) * (d**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, a, 1, 1).expand(b, a, s, 1)], -1)
    weights = torch.softmax(scores, -1)
    weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def assert_close(found, expected, isa: str, dtype, case: str, bound: float = 1e-5) -> None:
    """fp32 throughout: 1e-5 of the largest; where bf16 meets bf16: what rounding to 8 bits leaves."""
    bound = 1e-2 if dtype == BF16 and isa in ROUNDS else bound
    scale = expected.abs().max().clamp_min(1e-3)
    worst = ((found.double() - expected).abs().max() / scale).item() if found.numel() else 0.0
    assert worst <= bound, f"{case}: {worst:.3g} of the largest, more than {bound}"


def check(rng, b, a, c, s, t, d, v, dtype, isas=None, paths=(DECODE, PREFILL), bound=1e-5, **options) -> None:
    q, keys, values = normal(rng, b, a, s, d), normal(rng, b, c, t, d), normal(rng, b, c, t, v)
    (keys, k), (values, x) = cached(keys, dtype), cached(values, dtype)
    expected = truth(q, k, x, **options)
    if options.get("start") is not None:
        options["start"] = torch.tensor(options["start"])
    for isa, path in itertools.product(isas or ISAS, paths):
        native.set_isa(isa)
        native.set_panel_threshold(path)
        found = native.attend(q, keys, values, **options)
        case = f"B={b} A={a} C={c} S={s} T={t} D={d} V={v} {dtype} {isa} {path} {sorted(options)}"
        assert_close(found, expected, isa, dtype, case, bound)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, Q8_0], ids=str)
@pytest.mark.parametrize(("d", "v"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (576, 512)])
def test_sizes(d, v, dtype):
    """Every size of heads, every type of cache, every instruction set, both paths."""
    if dtype == Q8_0 and d % 32:
        pytest.skip("q8_0 has blocks of 32")
    rng = rng_for("sizes", d, v, dtype)
    check(rng, 1, 4, 2, 3, 130, d, v, dtype)
    check(rng, 1, 16, 1, 2, 65, d, v, dtype, paths=(0,))


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("s", [1, 2, 7, 64, 200])
def test_groups_and_queries(group, s):
    """One query to many, of one head of keys to a group of sixteen, at lengths around a page's."""
    rng = rng_for("groups", group, s)
    isas = sorted({"portable", *ISAS[1:2], ISAS[-1]}, key=ISAS.index)
    for t, dtype in zip((1, 63, 64, 65, 500, 1000), (F32, BF16, F16, Q8_0, BF16, F32), strict=True):
        if t >= s and s * group * t < 1_000_000:
            check(rng, 1, 2 * group, 2, s, t, 64, 64, dtype, isas=isas)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [0, 1, 40, 64, 100, 300])
def test_windows_sinks_and_starts(window, dtype):
    rng = rng_for("window", window, dtype)
    sinks = normal(rng, 8)
    for s in (1, 5, 70):
        check(rng, 2, 8, 2, s, 333, 64, 64, dtype, window=window, sinks=sinks, start=[0, 70])
        check(rng, 3, 8, 2, s, 200, 64, 64, dtype, window=window, lengths=[200, 77, 130], start=[3, 0, 129])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("s", [1, 9, 66])
def test_masks(s, dtype):
    """A mask replaces causality; a row that sees nothing is zero, with sinks too."""
    rng = rng_for("mask", s, dtype)
    mask = torch.from_numpy(rng.random((2, 1, s, 190)) < 0.3)
    mask[0, :, s // 2] = False
    mask[1, :, :, :128] = False
    check(rng, 2, 4, 2, s, 190, 64, 64, dtype, mask=mask)
    check(rng, 2, 4, 2, s, 190, 64, 64, dtype, mask=mask, sinks=normal(rng, 4), start=[100, 0])


@pytest.mark.parametrize("dtype", [F32, BF16, Q8_0], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    rng = rng_for("threads", dtype)
    for s, t, heads in ((1, 700, 8), (3, 200, 2), (150, 300, 4)):
        q = normal(rng, 2, 8, s, 64)
        keys, values = (cached(normal(rng, 2, heads, t, 64), dtype)[0] for _ in range(2))
        for isa in {"portable", ISAS[-1]}:
            native.set_isa(isa)
            native.set_threads(1)
            expected = native.attend(q, keys, values)
            assert torch.equal(native.attend(q[1:], keys[1:], values[1:]), expected[1:]), "alone as in a batch"
            for threads in (2, 3):
                native.set_threads(threads)
                assert torch.equal(native.attend(q, keys, values), expected), (s, t, isa, threads)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_who_sees_a_nan_gets_one_and_nobody_else(bad, dtype):
    """In a key, a value and a query; other rows keep their bits."""
    rng = rng_for("nan", dtype)
    q, k, v = normal(rng, 1, 4, 6, 64), normal(rng, 1, 2, 140, 64).to(dtype), normal(rng, 1, 2, 140, 64).to(dtype)
    for isa, path in itertools.product(ISAS, (DECODE, PREFILL)):
        native.set_isa(isa)
        native.set_panel_threshold(path)
        case, plain = f"{isa} {path}", native.attend(q, k, v)

        worse = v.clone()
        worse[0, 1, 137, 5] = bad  # seen by queries 3, 4, 5 of heads 2 and 3
        found = native.attend(q, k, worse)
        assert not found[0, 3:, 2:, 5].isfinite().any(), case
        assert found[0, :3].isfinite().all() and found[0, :, :2].equal(plain[0, :, :2]), case
        torch.testing.assert_close(found[0, :3], plain[0, :3], rtol=1e-2, atol=1e-2)
        assert found[0, :, :, :5].isfinite().all(), case

        worse = k.clone()
        worse[0, 0, 138, :] = bad if bad != bad else bad * q[0, 0, 4].sign().to(dtype)
        found = native.attend(q, worse, v)
        assert found[0, :4].equal(plain[0, :4]) and found[0, :, 2:].equal(plain[0, :, 2:]), case
        if bad != -float("inf"):
            assert found[0, 4, 0].isnan().all(), case

        asked = q.clone()
        asked[0, 2, 1, 7] = bad
        found = native.attend(asked, k, v)
        assert found[0, 1, 2].isnan().all(), case
        others = torch.ones(6, 4, dtype=torch.bool)
        others[1, 2] = False
        assert found[0][others].equal(plain[0][others]), case


def test_large_scores_and_negative_scales():
    """Scores of a thousand, whose fp32 form is known to 1e-4; e^x of what is far below the largest is 0."""
    rng = rng_for("large")
    for scale in (0.0, 40.0, -40.0):
        check(rng, 1, 4, 2, 5, 150, 64, 64, F32, scale=scale, bound=1e-4)
        mask = torch.from_numpy(rng.random((1, 1, 5, 150)) < 0.5)
        check(rng, 1, 4, 2, 5, 150, 64, 64, F32, scale=scale, bound=1e-4, mask=mask)


def test_exact():
    """kt_set_exact keeps bf16 multipliers out."""
    rng = rng_for("exact")
    q, k, v = normal(rng, 1, 8, 40, 64), normal(rng, 1, 2, 140, 64).to(BF16), normal(rng, 1, 2, 140, 64).to(BF16)
    native.set_exact(True)
    for path in (DECODE, PREFILL):
        native.set_panel_threshold(path)
        assert_close(native.attend(q, k, v), truth(q, k, v), "portable", F32, f"exact {path}")


def test_latents_share_their_memory():
    """MLA: one head, values are the first columns of keys."""
    rng = rng_for("mla")
    q, k = normal(rng, 1, 16, 2, 576), normal(rng, 1, 1, 200, 576).to(BF16)
    expected = truth(q, k, k[..., :512])
    for isa in ISAS:
        native.set_isa(isa)
        found = native.attend(q, k, k)[..., :512]
        assert_close(found, expected, isa, BF16, isa)


def test_no_queries_and_what_is_refused():
    q, k = torch.zeros(1, 4, 2, 64), torch.zeros(1, 2, 10, 64)
    assert native.attend(q[:, :, :0], k, k).shape == (1, 0, 4, 64)
    assert native.attend(q[:0], k[:0], k[:0]).shape == (0, 2, 4, 64)
    for wrong in (
        {"q": q[0]}, {"q": q[..., :3]}, {"keys": k.half()}, {"values": k[:, :1]}, {"q": q[:, :3]}, {"window": -1},
        {"sinks": torch.zeros(3)}, {"start": torch.zeros(1)}, {"start": torch.tensor([11])}, {"lengths": [1]},
        {"lengths": [2, 2]}, {"lengths": [11]}, {"mask": torch.ones(1, 1, 2, 9, dtype=torch.bool)},
        {"keys": k.to(Q8_0), "values": k.to(Q8_0)}, {"q": [1]}, {"q": q.to("meta")}, {"q": q.int()},
    ):  # fmt: skip
        arguments = {"q": q, "keys": k, "values": k} | wrong
        with pytest.raises(NativeError, match="attend"):
            native.attend(**arguments)
