"""The border: bad arguments become named errors; threads, forks, dtypes and KT_* do what they should."""

import ctypes
import os
import platform
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ktransformers import env, native
from ktransformers.errors import KTransformersError, NativeError, UnsupportedError
from tests.native.blocks import FORMATS, Packed, Type, random_weight, values

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


@pytest.fixture(autouse=True)
def _restore():
    yield
    native.set_threads(None)


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def experts(types=("Q4_K", "Q4_K", "Q6_K"), count=4, hidden=512, inner=256) -> native.Experts:
    r = rng()
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return native.Experts(*([random_weight(r, t, *s) for _ in range(count)] for t, s in zip(types, sizes, strict=True)))


def call(tokens=7, hidden=512, count=4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, count, (tokens, 2), generator=g)
    return torch.randn(tokens, hidden, generator=g), ids, torch.rand(tokens, 2, generator=g)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter at the repository root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- one fact in two places --------------------------------------------------------------------------------


def test_tables_agree():
    """SUPPORTED_TYPES, ACTIVATIONS, ISAS and block sizes are the library's own."""
    state = native.library.loaded()
    assert set(state.type_ids) == native.SUPPORTED_TYPES | native.SCALED_TYPES
    assert set(FORMATS) == native.SUPPORTED_TYPES
    for name, (block, size) in FORMATS.items():
        i = state.type_ids[name]
        assert (state.lib.kt_type_block(i), state.lib.kt_type_block_bytes(i)) == (block, size)
    lib = state.lib
    assert native.ACTIVATIONS == {
        "silu": lib.KT_SILU, "gelu": lib.KT_GELU, "gelu_tanh": lib.KT_GELU_TANH,
        "gelu_pytorch_tanh": lib.KT_GELU_TANH, "relu": lib.KT_RELU, "relu2": lib.KT_RELU2,
        "swigluoai": lib.KT_SWIGLU_OAI,
    }  # fmt: skip
    assert {f"KT_SCALE_{name}": i for name, i in native.SCALES.items()} == {
        name: getattr(lib, name) for name in dir(lib) if name.startswith("KT_SCALE_")
    }
    thresholds = (ROOT / "native/src/matmul/thresholds.c").read_text(encoding="ascii")
    assert set(re.findall(r"^    ROW\((\w+),", thresholds, re.MULTILINE)) == set(state.type_ids)
    assert tuple(native.isa_needs()) == env.ISAS
    built = [isa for isas in runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"].values() for isa in isas]
    assert sorted([*built, "portable"]) == sorted(env.ISAS)


def test_grids_are_those_of_python():
    """native/src/formats/iq_grids.h is what native/iq_tables.py makes of ktransformers/quants/iq_grids.py."""
    text = runpy.run_path(str(ROOT / "native" / "iq_tables.py"))["text"]()
    assert (ROOT / "native/src/formats/iq_grids.h").read_text(encoding="ascii") == text, "run python native/iq_tables.py"


def test_types_have_ggufs_ids():
    """The ids are those of the GGUF file format."""
    import gguf

    for name, i in native.library.loaded().type_ids.items():
        assert i >= 1000 if name in native.SCALED_TYPES else gguf.GGMLQuantizationType[name].value == i


def test_every_status_has_words():
    """kt_status_message covers every status of the header, each differently."""
    state = native.library.loaded()
    header = (ROOT / "native/include/kt_native.h").read_text()
    codes = [int(n) for n in re.findall(r"KT_(?:OK|ERR_\w+) = (\d+)", header)]
    words = [state.text(state.lib.kt_status_message(c)) for c in [*codes, 99]]
    assert codes == list(range(16)) and len(set(words)) == len(words)


# ---- bad arguments -----------------------------------------------------------------------------------------


def bad_weights():
    good = random_weight(rng(), "Q4_K", 8, 512)
    yield "type", Packed(good.data, Type("Q8_K"), (8, 512)), UnsupportedError, "Q8_K"
    yield "near type", Packed(good.data, Type("Q4_k"), (8, 512)), UnsupportedError, "did you mean 'Q4_K'"
    yield "block", Packed(good.data, good.type, (8, 500)), NativeError, "multiple of 256"
    yield "short", Packed(good.data[:-1], good.type, (8, 512)), NativeError, "2303 bytes, expected 2304"
    yield "rows", Packed(good.data, good.type, (0, 512)), NativeError, "[(]0, 512[)]"
    yield "fraction", Packed(good.data, good.type, (8.0, 512)), NativeError, "whole numbers"
    yield "0-D", Packed(good.data, good.type, ()), NativeError, "whole numbers"
    yield "beyond C", Packed(good.data, good.type, (2**70, 512)), NativeError, "2304 bytes, expected"
    yield "a tensor", torch.zeros(8, 512), NativeError, "found Tensor, expected a Packed"
    yield "none", None, NativeError, "found NoneType, expected a Packed"
    yield "a list", [[1.0]], NativeError, "found list, expected a Packed"
    yield "no type", Packed(good.data, None, (8, 512)), NativeError, "expected a Packed"
    yield "numpy", Packed(good.data.numpy(), good.type, (8, 512)), NativeError, "found ndarray.*uint8"
    yield "meta", Packed(good.data.to("meta"), good.type, (8, 512)), NativeError, "on meta, expected.*cpu"
    yield "sparse", Packed(good.data.to_sparse(), good.type, (8, 512)), NativeError, "sparse_coo"
    yield "3-D", Packed(good.data, good.type, (2, 4, 512)), NativeError, "expected a matrix"
    yield "dtype", Packed(good.data.float(), good.type, (8, 512)), NativeError, "uint8"
    yield (
        "strided",
        Packed(torch.zeros(4608, dtype=torch.uint8)[::2], good.type, (8, 512)),
        NativeError,
        "contiguous",
    )


@pytest.mark.parametrize(
    ("weight", "error", "words"), [b[1:] for b in bad_weights()], ids=[b[0] for b in bad_weights()]
)
def test_bad_weights_are_named(weight, error, words):
    """A weight that cannot be computed raises before C sees it, with the name and what was expected."""
    with pytest.raises(error, match=words) as caught:
        native.Linear(weight, name="blk.3")
    assert "blk.3 (weight" in str(caught.value)
    with pytest.raises(error, match=r"blk\.3\.0\.gate"):
        native.Experts([weight], [weight], [weight], name="blk.3")


def test_bad_inputs_are_named():
    """Wrong dtype, width, bias, routing shapes and dtypes raise NativeError that says what was found."""
    linear = native.Linear(random_weight(rng(), "Q8_0", 8, 64), name="blk.1")
    with pytest.raises(NativeError, match=r"blk\.1.*last dimension 64"):
        linear(torch.zeros(2, 63))
    with pytest.raises(NativeError, match="float64"):
        linear(torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(NativeError, match=r"bias.*expected float \[8\]"):
        native.Linear(linear.weight, bias=torch.zeros(9))
    e, (x, ids, w) = experts(), call()
    for arguments in ((x, ids[:3], w[:3]), (x, ids, w[:, :1]), (x[0], ids, w), (x, ids[0], w[0])):
        with pytest.raises(NativeError, match="expected"):
            e(*arguments)
    with pytest.raises(NativeError, match="expected int64"):
        e(x, ids.float(), w)
    with pytest.raises(NativeError, match="float dtype"):
        e(x, ids, ids)


def unreadable(x: torch.Tensor):
    """What may arrive in place of tensor `x` and has no memory that C could read."""
    yield x.tolist(), "found list"
    yield None, "found NoneType"
    yield x.numpy(), "found ndarray"
    yield x.to_sparse(), "torch.sparse_coo"
    yield torch.nested.nested_tensor([x, x]), "nested"
    yield torch.nested.nested_tensor([x, x], layout=torch.jagged), "nested"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_a_readable_tensor_is_named():
    """Lists, None, arrays, sparse and nested tensors in any place raise NativeError with that place's name."""
    weight = random_weight(rng(), "Q8_0", 8, 64)
    linear = native.Linear(weight, name="blk.1")
    for bad, words in unreadable(torch.zeros(2, 64)):
        with pytest.raises(NativeError, match=rf"^blk\.1: {words}|^blk\.1: found.*{words}.*expected.*64"):
            linear(bad)
    for bad, words in unreadable(torch.zeros(8)):
        if bad is not None:
            with pytest.raises(NativeError, match=rf"^blk\.1 \(bias\): found.*{words[6:]}.*expected float \[8\]"):
                native.Linear(weight, bias=bad, name="blk.1")
    with pytest.raises(NativeError, match=r"int64 \[8\], expected float \[8\]"):
        native.Linear(weight, bias=torch.zeros(8, dtype=torch.int64))
    e, good = experts(), call()
    for place, subject in enumerate(("experts", r"experts \(ids\)", r"experts \(weights\)")):
        for bad, _ in unreadable(good[place]):
            with pytest.raises(NativeError, match=f"^{subject}: found.*expected"):
                e(*good[:place], bad, *good[place + 1 :])
    with pytest.raises(NativeError, match="on meta, expected int64"):
        e(good[0], good[1].float().to("meta"), good[2])
    for bad in (None, 3, "Q4_K", torch.zeros(3), Packed(torch.zeros(1), Type("F32"), ())):
        with pytest.raises(NativeError, match="^dequantize"):
            native.dequantize(bad)


def test_experts_that_do_not_fit_are_named():
    """Mismatched counts, shapes and unknown activations raise with the expert's name."""
    r = rng()
    a, b = random_weight(r, "Q8_0", 64, 32), random_weight(r, "Q8_0", 32, 64)
    with pytest.raises(NativeError, match=r"ffn\.1\.up.*\[32, 64\].*\[64, 32\]"):
        native.Experts([a, a], [a, b], [b, b], name="ffn")
    with pytest.raises(NativeError, match="2 gate, 1 up"):
        native.Experts([a, a], [a], [b, b])
    with pytest.raises(NativeError, match="0 gate"):
        native.Experts([], [], [])
    with pytest.raises(UnsupportedError, match="did you mean 'silu'"):
        native.Experts([a], [a], [b], "silo")
    for bad in ([], None, 3, {"silu": 1}):
        with pytest.raises(UnsupportedError, match="^ffn: activation.*Known: silu"):
            native.Experts([a], [a], [b], bad, name="ffn")
    for bad in (None, a, 3, "abc", iter([a])):
        with pytest.raises(NativeError, match=r"^ffn \(up\): found.*expected a list"):
            native.Experts([a], bad, [b], name="ffn")
    with pytest.raises(NativeError, match=r"^ffn\.0\.down: found str, expected a Packed"):
        native.Experts([a], [a], ["b"], name="ffn")


def test_c_checks_its_own_arguments():
    """The library itself refuses NULLs, unknown ids and impossible sizes with a status."""
    state, pool = native.library.pooled()
    ffi, lib = state.ffi, state.lib
    data = ffi.new("uint8_t[]", 34 * 4)
    x = ffi.new("float[]", 64)

    def status(pool=pool, dtype=0, tokens=1, x=x, out=x, **fields):
        w = {"type": 8, "rows": 4, "cols": 32, "data": data, "bytes": 136, **fields}
        return lib.kt_linear(pool, ffi.new("kt_weight *", w), ffi.NULL, x, dtype, tokens, out)

    assert status(out=ffi.new("float[4]")) == lib.KT_OK
    assert status(pool=ffi.NULL) == status(data=ffi.NULL) == status(x=ffi.NULL) == lib.KT_ERR_NULL
    assert status(type=9) == status(type=-1) == lib.KT_ERR_TYPE
    assert status(cols=33) == lib.KT_ERR_BLOCK
    assert status(bytes=135) == status(bytes=137) == status(bytes=0) == lib.KT_ERR_BYTES
    for value in (0, -1, -(2**63), 2**62, 2**63 - 1):
        assert status(rows=value) == status(cols=value) == lib.KT_ERR_SHAPE
    assert status(rows=2**30, cols=2**30, bytes=2**63) == lib.KT_ERR_BYTES
    assert status(tokens=-1) == status(tokens=2**62) == lib.KT_ERR_SHAPE
    assert status(dtype=3) == status(dtype=-1) == lib.KT_ERR_DTYPE
    assert status(tokens=0, x=ffi.NULL) == lib.KT_OK
    out = ffi.new("kt_pool **")
    assert lib.kt_pool_create(-1, out) == lib.kt_pool_create(native.MAX_THREADS + 1, out) == lib.KT_ERR_THREADS
    assert lib.kt_pool_create(native.MAX_THREADS, out) == lib.KT_OK  # starts none: they start at first use
    lib.kt_pool_destroy(out[0])
    assert lib.kt_isa_force(b"mmx") == lib.KT_ERR_ISA
    assert lib.kt_isa_force(ffi.NULL) == lib.KT_ERR_NULL
    lib.kt_pool_destroy(ffi.NULL)
    lib.kt_experts_destroy(ffi.NULL)


# ---- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_and_out(dtype):
    """16-bit inputs give the fp32 result of the same values, rounded once, for linear and experts alike."""
    for name in ("F32", "BF16", "Q4_K"):
        linear = native.Linear(random_weight(rng(), name, 40, 512), bias=torch.linspace(-1, 1, 40).to(dtype))
        x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (2, 3, 40)
        assert torch.equal(y, linear(x.float()).to(dtype))
    x, ids, w = call()
    e = experts()
    y = e(x.to(dtype), ids, w)
    assert y.dtype == dtype and torch.equal(y, e(x.to(dtype).float(), ids.int(), w.double()).to(dtype))


def test_float16_edges():
    """Overflow, subnormals and ties convert as torch converts them."""
    edge = torch.tensor(
        [65504.0, 65519.9, 65520.0, 1e9, 6e-8, 2.9e-8, 3.0e-8, -5.9e-5, 1 + 2**-11, 1 + 3 * 2**-11, 0.0]
    )
    weight = torch.diag(torch.ones(len(edge)))
    linear = native.Linear(Packed(weight.view(torch.uint8).reshape(-1), Type("F32"), tuple(weight.shape)), bias=edge)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(linear(torch.zeros(1, len(edge), dtype=dtype))[0], edge.to(dtype))
    every = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    packed = Packed(every.view(torch.uint8), Type("F16"), (1, 2**16))
    assert torch.equal(native.dequantize(packed)[0].nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))


def test_views_are_accepted():
    """Strided inputs are made contiguous, not misread; gradients go through them."""
    linear = native.Linear(random_weight(rng(), "F32", 5, 64))
    x = torch.randn(64, 6, requires_grad=True)
    assert torch.equal(linear(x.T), linear(x.detach().T.contiguous()))
    minus = torch.complex(x.detach(), x.detach()).conj().imag.T  # a view that torch negates when it reads
    assert minus.is_neg() and torch.equal(linear(minus), -linear(x.T))
    (found,) = torch.autograd.grad(linear(x.T).sum(), x)
    assert torch.allclose(found, native.dequantize(linear.weight).sum(0)[:, None].expand(64, 6), rtol=1e-5)


# ---- threads, forks ----------------------------------------------------------------------------------------


def test_thread_counts_give_the_same_bits():
    """1, 2, 3 and 5 threads agree bit for bit in decode and prefill, also with more threads than cores."""
    e, linear = experts(), native.Linear(random_weight(rng(), "Q8_0", 333, 96))
    for tokens in (1, 7, 40):
        x, ids, w = call(tokens)
        results = []
        for count in (1, 2, 3, 5):
            native.set_threads(count)
            assert native.threads() == count
            results.append((e(x, ids, w), linear(x[:, :96])))
        for y, z in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(z, results[0][1])


def test_bad_thread_counts():
    """set_threads refuses what is not a count, and so do the other numbers of the border."""
    for bad in (0, -1, 1.5, "2", True, 1025, 5000, 10**12, [2]):
        with pytest.raises(NativeError, match=r"^set_threads: found.*from 1 to 1024, or None"):
            native.set_threads(bad)
    for bad in (-1, None, "2", 2**31):
        with pytest.raises(NativeError, match="^set_panel_threshold: found"):
            native.set_panel_threshold(bad)
    for kind, iterations in (("int4", 1), (["f32"], 1), ("f32", -1), ("f32", None), ("f32", 2**70)):
        with pytest.raises(NativeError, match="^bench_peak.*expected"):
            native.bench_peak(kind, iterations)
    for bad in (None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8, device="meta")):
        with pytest.raises(NativeError, match="^bench_read: found"):
            native.bench_read(bad)


def test_many_python_threads_share_the_pool():
    """Concurrent calls, with the pool replaced under them, all give the right answer."""
    native.set_threads(2)
    e, (x, ids, w) = experts(), call(9)
    expected, wrong = e(x, ids, w), []

    def work():
        for _ in range(30):
            if not torch.equal(e(x, ids, w), expected):
                wrong.append(1)

    crowd = [threading.Thread(target=work) for _ in range(4)]
    for t in crowd:
        t.start()
    for count in (3, 1, 2) * 5:
        native.set_threads(count)
    for t in crowd:
        t.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork():
    """A child forked while another thread is inside a call computes with fresh workers and ends."""
    code = """
import os, sys, threading, torch
from tests.native.test_native import experts, call
from ktransformers import native
torch.set_num_threads(1)
native.set_threads(3)
e, c = experts(), call(40)
expected = e(*c)
stop = False
def busy():
    while not stop: e(*c)
t = threading.Thread(target=busy); t.start()
bad = 0
for i in range(8):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(e(*c), expected) and torch.equal(e(*c), expected) else 1)
    bad += os.waitpid(pid, 0)[1]
stop = True; t.join()
sys.exit(1 if bad else 0)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


# ---- the environment ---------------------------------------------------------------------------------------


def test_import_starts_nothing():
    """Importing the module and asking what the machine is starts no thread."""
    code = """
import os, torch
before = len(os.listdir("/proc/self/task"))
from ktransformers import native
native.isas(), native.threads(), native.cpu_features()
assert len(os.listdir("/proc/self/task")) == before
"""
    if Path("/proc/self/task").is_dir():
        done = python(code)
        assert done.returncode == 0, done.stderr


def test_kt_isa_and_kt_threads(monkeypatch):
    """KT_ISA lowers the instruction set, KT_THREADS sets the pool; an unusable KT_ISA lists what works."""
    monkeypatch.setenv("KT_ISA", "portable")
    monkeypatch.setenv("KT_THREADS", "3")
    monkeypatch.setattr(native.library, "_state", None)
    assert (native.isa(), native.threads()) == ("portable", 3)
    native.set_isa(native.isas()[-1])
    for name in [n for n in env.ISAS if n not in native.isas()]:
        monkeypatch.setenv("KT_ISA", name)
        monkeypatch.setattr(native.library, "_state", None)
        with pytest.raises(NativeError, match="Usable here"):
            native.isa()


def test_set_isa():
    """set_isa accepts exactly isas(), and cpu_features explains them."""
    for name in native.isas():
        native.set_isa(name)
        assert native.isa() == name
    for bad in ("avx1024", 3, None, [], b"avx2", "portable\0", "\ud800"):
        with pytest.raises(NativeError, match="^instruction set=.*Usable here"):
            native.set_isa(bad)
    assert native.isas()[0] == "portable"
    assert ("avx2" in native.isas()) <= native.cpu_features()["avx2"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="x86-64 Linux only")
def test_cpu_features_are_those_of_the_kernel():
    """cpuid as we read it says what /proc/cpuinfo says; AMX counts where the kernel lets this process use tiles."""
    listed = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE).group(1)
    flags = {flag.replace("_", "") for flag in listed.split()}
    granted = ctypes.c_uint64()
    ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted))  # arch_prctl(ARCH_GET_XCOMP_PERM)
    tiles = bool(granted.value >> 18 & 1)
    for name, found in native.cpu_features().items():
        if name not in ("asimddp", "i8mm", "arm_bf16"):
            assert found == (name.replace("_", "") in flags and (tiles or not name.startswith("amx"))), name


def test_not_built_is_explained(monkeypatch):
    """Without the compiled module, available() is False and the first use names the command to run."""
    monkeypatch.setattr(native.library, "_state", None)
    monkeypatch.setitem(sys.modules, "ktransformers._native", None)
    monkeypatch.delattr("ktransformers._native")
    assert not native.available()
    with pytest.raises(NativeError, match="run `make setup` in the checkout") as caught:
        native.isa()
    assert native.NOT_BUILT in str(caught.value)
    assert issubclass(NativeError, KTransformersError)


def test_dequantize_keeps_the_shape():
    """dequantize accepts vectors, matrices and stacks."""
    flat = random_weight(rng(), "Q5_K", 6, 256)
    stack = Packed(flat.data, flat.type, (2, 3, 256))
    assert torch.equal(native.dequantize(stack).double(), values(flat).view(2, 3, 256))
    row = random_weight(rng(), "F16", 1, 9)
    assert native.dequantize(Packed(row.data, row.type, (9,))).shape == (9,)


def test_scratch_does_not_grow_with_layers():
    """One arena serves every layer: a second layer of the same size adds nothing, and its size is known."""
    rng = np.random.default_rng(0)
    layers = [native.Experts(*[[random_weight(rng, "Q4_K", 256, 256) for _ in range(4)] for _ in "gud"]) for _ in "ab"]
    x, ids, scale = torch.randn(40, 256), torch.randint(0, 4, (40, 2)), torch.rand(40, 2)
    native.set_threads(2)
    sizes = []
    for layer in layers:
        layer(x, ids, scale)
        sizes.append(native.scratch_bytes())
    assert 0 < sizes[0] == sizes[1] < 64 << 20
