"""Operators on packed weights of a GPU, without one: the same code, its kernels in Triton's interpreter on the CPU."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ktransformers import native, optimize_and_load
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels import compiler, gating, layouts, linear
from ktransformers.kernels import experts as kernels
from ktransformers.loaders import ExpertWeights
from ktransformers.machine.streams import registered
from ktransformers.operators import base_operator, on_gpu
from ktransformers.operators import linear as linear_module
from ktransformers.operators.base_operator import InferenceState
from ktransformers.operators.experts import KExpertsCPU, KExpertsTorch, KTransformersExperts
from ktransformers.operators.experts_packed import KExpertsMarlin, KExpertsPacked
from ktransformers.operators.inner_ops import final_name
from ktransformers.operators.linear import KLinearTorch, KTransformersLinear
from ktransformers.operators.linear_packed import KLinearFP8, KLinearMarlin, KLinearPacked
from ktransformers.quants.blocks import QUANT_TYPES, Packed
from tests.dict_weights import DictWeights
from tests.kernels.weights import random_weight
from tests.operators.test_published_checkpoints import CPU, EXPERTS, LINEAR, gpt_oss, gpt_oss_config
from tests.simulated_gpu import CaptureError, SimulatedStreams
from tests.tiny import meta_model, random_ids, relative_error, save, tiny_config, tiny_model

KEY = "model.layers.0.proj"

EXACT = 1e-4
"""float32 sums in another order, of K up to 512."""


@pytest.fixture(autouse=True)
def fresh_notices():
    saved = set(base_operator._told)
    base_operator._told.clear()
    yield
    base_operator._told |= saved


class Published(DictWeights):
    """Weights in published bytes, not only tensors."""

    def packed(self, name):
        return self.tensors[name] if not isinstance(self.tensors[name], torch.Tensor) else super().packed(name)

    def __init__(self, weights):
        super().__init__({})
        self.tensors = weights

    def quant_type(self, name):
        found = self.tensors[name]
        return super().quant_type(name) if isinstance(found, torch.Tensor) else found.type.name


def floats(weight, name="F32"):
    made = weight.to(QUANT_TYPES[name].torch_dtype).contiguous()
    return Packed(made.view(torch.uint8).view(-1), QUANT_TYPES[name], tuple(weight.shape))


def two(weight, op="KLinearMarlin", bias=True, dtype=torch.float32, **kwargs):
    """(an operator on `weight`, the dense one on the same numbers)."""
    n, k = weight.shape
    made = {f"{KEY}.weight": weight, f"{KEY}.bias": torch.randn(n, generator=torch.Generator().manual_seed(9))}
    meta = nn.Linear(k, n, bias, "meta", dtype)
    built = []
    for name in (op, "KLinearTorch"):
        more = kwargs if name == op else {}
        module = KTransformersLinear(KEY, Published(made), None, meta, **CPU, generate_op=name, **more)
        module.load()
        built.append(module)
    return built


def inputs(rows, k, dtype=torch.float32):
    return torch.randn(rows, 1, k, generator=torch.Generator().manual_seed(rows), dtype=torch.float32).to(dtype)


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "GPTQ_INT4", "GPTQ_ORDER",
                                  "GPTQ_INT8", "AWQ", "RAWINT4", "INT8_ROW", "NVFP4_SEPARATE", "FP8", "MXFP8"])  # fmt: skip
def test_published_weights_are_computed_as_they_are(name, interpreter, monkeypatch):
    """One row, few and many, each by its kernel, with a bias and without; nothing is lost, and nothing said."""
    monkeypatch.setattr(linear, "DOT_ROWS", 4)
    monkeypatch.setattr(warnings, "warn", lambda *args, **_: pytest.fail(f"warned: {args[0]}"))
    weight = random_weight(name, 40, 512)
    for rows, bias in ((1, True), (3, False), (7, True)):
        packed, dense = two(weight, bias=bias)
        assert type(packed.active) is KLinearMarlin and packed.active.lost is None
        x = inputs(rows, 512)
        assert relative_error(packed(x), dense(x)) < EXACT
    assert not list(packed.parameters()) and f"KLinearMarlin on cpu, {packed.active.words.layout.name}" in repr(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_keep_their_type(dtype, interpreter):
    packed, dense = two(random_weight("Q4_K", 40, 512), dtype=dtype if dtype != torch.float64 else torch.float32)
    for x in (inputs(2, 512, dtype), inputs(5, 1024, dtype)[..., ::2]):
        assert packed(x).dtype == dtype
        assert relative_error(packed(x), dense(x)) < {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, EXACT)


@pytest.mark.parametrize("bits, group, worst", [(4, 32, 0.12), (4, 128, 0.13), (8, 64, 0.008), (8, -1, 0.01)])
@pytest.mark.parametrize("stored", ["F32", "BF16", "IQ2_XS"])
def test_what_has_no_packed_form_is_quantized_and_that_is_said_once(stored, bits, group, worst, interpreter):
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(0))
    weight = floats(weight, stored) if stored in ("F32", "BF16") else random_weight(stored, 128, 512)
    with pytest.warns(UserWarning) as told:
        packed, dense = two(weight, num_bits=bits, group_size=group)
        two(weight, num_bits=bits, group_size=group)
    (text,) = [str(one.message) for one in told]
    scales = "one scale a row" if group == -1 else f"a scale for {group} columns"
    assert re.search(rf"KLinearMarlin: what has no .* to {bits} bits, {scales}; {KEY} loses [\d.]+% \(root", text)
    words, lost = packed.active.words, packed.active.lost
    assert words.layout == layouts.quantized_layout(torch.float32, 512, bits, group)
    assert 0 < lost < worst * (1.6 if stored == "IQ2_XS" else 1) and f"INT{bits} (lost {lost:.1%})" in repr(packed)
    exact = linear.dequantize.dequantize(words)
    assert relative_error(exact, weight.dequantize()) < 3 * worst
    x = inputs(1, 512)
    assert relative_error(packed(x), nn.functional.linear(x, exact, dense.bias)) < EXACT


def test_a_weight_handed_over_is_quantized_and_one_of_another_shape_refused(interpreter):
    packed, _ = two(random_weight("Q8_0", 16, 64), num_bits=8)
    with pytest.warns(UserWarning, match="quantized to 8 bits, a scale for 64 columns"):
        packed.load(w=(torch.ones(16, 64), torch.ones(16)))
    assert relative_error(packed(torch.ones(1, 64)), torch.full((1, 16), 65.0)) < 1e-2
    packed.gguf_loader.tensors[f"{KEY}.weight"] = random_weight("Q8_0", 16, 32)
    with pytest.raises(ValueError, match=rf"{KEY}.weight: the checkpoint holds \[16, 32\], the layer expects \[16, 64\]"):
        packed.load()
    packed.unload()
    assert packed.active.words is None and packed.mode is InferenceState.UNLOAD


@pytest.mark.parametrize("k, kwargs", [(48, {}), (96, {}), (160, {"group_size": 64})])
def test_columns_that_make_no_groups_are_dense_with_a_notice(k, kwargs, interpreter):
    weight = floats(torch.randn(16, k))
    with pytest.warns(UserWarning, match=f"KLinearMarlin on cpu: INT4 with {k} columns.*; ?|KLinearTorch takes its place"):
        packed, dense = two(weight, **kwargs)
    assert type(packed.active) is KLinearTorch and torch.equal(packed(inputs(2, k)), dense(inputs(2, k)))
    assert packed.weight.shape == (16, k)
    packed.load()
    assert type(packed.active) is KLinearTorch


def test_groups_of_different_sizes_are_found_when_loading(interpreter):
    weight = random_weight("GPTQ_ORDER", 16, 256)
    weight.order[:] = 0
    with pytest.warns(UserWarning, match="quantized to 4 bits"):
        two(weight)
    made = KLinearPacked(KEY, Published({f"{KEY}.weight": weight}), None, nn.Linear(256, 16, False, "meta"), "cpu")
    with pytest.raises(NotImplementedError, match="different numbers of columns"):
        made.load()


def test_without_a_name_a_gpu_takes_packed_what_has_a_packed_form(interpreter, monkeypatch):
    """Dense is what has none, and that is said of what was quantized."""
    monkeypatch.setattr(linear_module, "is_cpu", lambda device: False)
    for name, kind in (("Q4_K", KLinearPacked), ("F32", KLinearTorch), ("IQ2_XS", KLinearTorch)):
        weight = floats(torch.randn(16, 256)) if name == "F32" else random_weight(name, 128, 256)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            packed, dense = two(weight, None)
        assert type(packed.active) is kind and relative_error(packed(inputs(1, 256)), dense(inputs(1, 256))) < EXACT
        assert [str(one.message).partition(";")[0] for one in told] == (
            ["KTransformersLinear on cpu: IQ2_XS has no packed form there"] if name == "IQ2_XS" else []
        )


def test_fp8_keeps_its_bits_and_other_weights_are_dense_under_its_name(interpreter):
    packed, dense = two(random_weight("FP8", 144, 256), "KLinearFP8")
    assert type(packed.active) is KLinearFP8 and packed.active.words.layout.name == "F8_E4M3"
    assert relative_error(packed(inputs(1, 256)), dense(inputs(1, 256))) < EXACT
    with pytest.warns(UserWarning, match="KLinearFP8 on cpu: Weights of type F32 have no packed form.*KLinearTorch takes"):
        assert type(two(floats(torch.ones(16, 64)), "KLinearFP8")[0].active) is KLinearTorch


def test_gradients_pass(interpreter):
    packed, dense = two(random_weight("GPTQ_ORDER", 40, 256))
    found, expected = inputs(3, 256).requires_grad_(), inputs(3, 256).requires_grad_()
    for module, x in ((packed, found), (dense, expected)):
        module(x).square().sum().backward()
    assert relative_error(found.grad, expected.grad) < EXACT


def test_layers_of_a_model_share_a_workspace(interpreter):
    """It holds what any number of rows up to DOT_ROWS takes."""
    weights = Published({f"{KEY}.weight": random_weight("Q4_K", 40, 2048), "b.weight": random_weight("Q4_0", 16, 64)})
    first, second = (
        KLinearMarlin(key, weights, None, nn.Linear(*reversed(weights.shape(f"{key}.weight")), False, "meta"), "cpu")
        for key in (KEY, "b")
    )
    first.load(), second.load()
    assert first.workspace is second.workspace
    for one in (first, second):
        most = linear.most_workspace(one.words, torch.float32)
        assert most == max(linear.workspace_size(one.words, rows, torch.float32) for rows in range(1, 129))
        assert one.workspace.take(most) is first.workspace._memory[-1]
    assert first.workspace.take(on_gpu.Workspace.MOST + 1) is None
    assert on_gpu.Workspace.of(Published({}), torch.device("cpu")) is not first.workspace


def test_shapes_without_values_and_a_compiled_layer(interpreter):
    packed, _ = two(random_weight("Q8_0", 16, 64))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        assert packed(mode.from_tensor(torch.ones(2, 3, 64))).shape == (2, 3, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(packed, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(2, 64)), packed(torch.ones(2, 64)))


# --- what is said before loading --------------------------------------------------------------------------------------


def problems(cls, module, **kwargs):
    return cls.check(KEY, module, {**CPU, **kwargs}, None)


def test_wrong_bits_and_groups_are_found_before_loading():
    layer, experts = nn.Linear(64, 16, device="meta"), meta_model(tiny_config("qwen3_moe")).model.layers[0].mlp.experts
    for cls, module, op in ((KTransformersLinear, layer, "KLinearMarlin"), (KTransformersExperts, experts, "MLPCUDAExperts")):
        assert problems(cls, module, generate_op=op, num_bits=8, group_size=-1) == []
        found = problems(cls, module, generate_op=op, num_bits=3, group_size=48)
        assert found == ["num_bits: found 3, expected 4, 8", "group_size: found 48, expected 32, 64, 128, -1 (one scale a row)"]
        assert problems(cls, module, generate_op=op, num_bits=True) == ["num_bits: found True, expected 4, 8"]
        (found,) = problems(cls, module, num_bits=4, group_size=64)
        assert found.startswith("num_bits and group_size: only KLinearMarlin,") and "names no operator" in found
    (found,) = problems(KTransformersLinear, layer, generate_op="KLinearTorch", num_bits=4)
    assert found.startswith("num_bits: only") and found.endswith("this rule names KLinearTorch; leave num_bits out")


@pytest.mark.parametrize("device, triton, found", [
    ("cuda", None, "its kernels need Triton, which cannot be imported (ModuleNotFoundError: no triton); pip install triton"),
    ("cuda", object(), "this machine has no such GPU"),
    ("xpu", object(), "its kernels run on GPUs of NVIDIA and AMD only"),
])  # fmt: skip
def test_where_kernels_do_not_run_dense_weights_take_their_place(device, triton, found, monkeypatch):
    monkeypatch.setattr(compiler, "triton", triton)
    monkeypatch.setattr(compiler, "missing", "ModuleNotFoundError: no triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meta, weights = nn.Linear(64, 16, device="meta"), DictWeights({f"{KEY}.weight": torch.ones(16, 64)})
    with pytest.warns(UserWarning) as told:
        module = KTransformersLinear(KEY, weights, None, meta, device, "VLinearMarlin", device)
    assert type(module.active) is KLinearTorch and type(KTransformersLinear(KEY, weights, None, meta, device).active) is KLinearTorch
    assert [str(one.message) for one in told] == [
        f"VLinearMarlin on {device}: {found}; KLinearTorch takes its place, with dense weights in the model's dtype: mind the memory"
    ]
    assert final_name("KExpertsMarlin", device) == "KExpertsTorch" and final_name("MLPCUDAExperts", "cpu") == "KExpertsCPU"


def test_a_gpu_that_triton_does_not_compile_for(interpreter, monkeypatch):
    monkeypatch.setattr("ktransformers.operators.linear_packed.too_old", lambda device: "Triton compiles for others only.")
    with pytest.warns(UserWarning, match="KLinearMarlin on cpu: Triton compiles for others only. KLinearTorch takes its place"):
        packed, _ = two(random_weight("Q8_0", 16, 64))
    assert type(packed.active) is KLinearTorch


def test_a_variable_switches_kernels_off(interpreter, monkeypatch):
    monkeypatch.setenv("KT_KERNELS", "0")
    assert final_name("KLinearMarlin", "cuda") == "KLinearTorch" and final_name("KExpertsMarlin", "cpu") == "KExpertsCPU"


def test_kernels_and_c_know_the_same_activations():
    assert {*gating._ACTIVATIONS, "swigluoai"} == set(native.ACTIVATIONS)


# --- experts ----------------------------------------------------------------------------------------------------------

LAYER = "model.layers.2.mlp.experts"
COUNT, HIDDEN, WIDTH = 8, 64, 32


class ExpertsOf(DictWeights):
    """A layer of experts in published bytes: types of gate, up and down."""

    def __init__(self, gate, up, down, hidden=HIDDEN, width=WIDTH):
        super().__init__({})
        self.made = [[random_weight(kind, *shape, 100 * i + e) for e in range(COUNT)] for i, (kind, shape) in enumerate(
            ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))))]  # fmt: skip
        dense = [torch.stack([one.dequantize() for one in part]) for part in self.made]
        self.tensors = {f"{LAYER}.gate_up_proj": torch.cat(dense[:2], 1), f"{LAYER}.down_proj": dense[2]}
        self.kinds = {f"{LAYER}.gate_up_proj": {gate, up}, f"{LAYER}.down_proj": {down}}

    def experts(self, prefix):
        return ExpertWeights(*self.made)

    def infos(self, name):
        from types import SimpleNamespace

        return [SimpleNamespace(type=SimpleNamespace(name=kind)) for kind in self.kinds[name]]


def experts_module(weights):
    _, width, hidden = weights.tensors[f"{LAYER}.gate_up_proj"].shape
    config = tiny_config("qwen3_moe", hidden_size=hidden, moe_intermediate_size=width // 2)
    return meta_model(config).get_submodule(LAYER)


def layer(weights, op="KExpertsMarlin", **kwargs):
    module = KTransformersExperts(LAYER, weights, None, experts_module(weights), generate_op=op, **{**CPU, **kwargs})
    module.load()
    return module


def routing(tokens=7, k=3, hidden=HIDDEN, seed=0):
    torch.manual_seed(seed)
    return torch.randn(tokens, hidden), torch.randint(-1, COUNT + 1, (tokens, k)), torch.rand(tokens, k)


@pytest.mark.parametrize("types", [("Q8_0", "Q8_0", "Q4_0"), ("Q4_0", "Q8_0", "MXFP4"), ("FP8", "FP8", "INT8_ROW")])
@pytest.mark.parametrize("pairs", [0, 1 << 20])
def test_experts_are_computed_as_they_are(types, pairs, interpreter, monkeypatch):
    """Few tokens and many; ids of nobody, and one named twice."""
    monkeypatch.setattr(kernels, "PAIRS_BY_GEMV", pairs)
    weights = ExpertsOf(*types)
    packed, dense = layer(weights), layer(weights, "KExpertsTorch")
    assert type(packed.active) is KExpertsMarlin and len(packed.active.experts.first) == 1 + (types[0] != types[1])
    hidden, ids, w = routing(4)
    ids[1], ids[2] = 5, -1
    for args in ((hidden, ids, w), routing(0), (hidden[:2].bfloat16(), ids[:2].int(), w[:2].bfloat16())):
        found, expected = packed(*args), dense(*args)
        assert found.dtype == args[0].dtype and found.shape == expected.shape
        if len(found):
            assert relative_error(found, expected) < (EXACT if found.dtype == torch.float32 else 2e-2)
    assert not packed.state_dict() and f"KExpertsMarlin on cpu, {packed.active.experts.first[0].layout.name}" in repr(packed)
    packed.unload()
    assert packed.active.experts is None


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_dense_experts_are_quantized_and_that_is_said_once(family, interpreter):
    model = tiny_model(family)
    weights, meta = DictWeights(model.state_dict()), meta_model(model.config).get_submodule(LAYER)
    with pytest.warns(UserWarning, match=rf"KExpertsMarlin: .* to 8 bits, a scale for 32 columns; {LAYER} loses 0\.\d% "):
        module = KTransformersExperts(LAYER, weights, None, meta, **CPU, generate_op="KExpertsMarlin", num_bits=8, group_size=32)
        module.load()
    assert 0 < module.active.lost < 0.008
    hidden, ids, w = routing(3)
    ids = ids.clamp(0, COUNT - 1)
    with torch.no_grad():
        assert relative_error(module(hidden, ids, w), model.get_submodule(LAYER)(hidden, ids, w)) < 0.03


def test_experts_that_kernels_do_not_compute_are_dense_with_a_notice(interpreter, monkeypatch):
    weights = ExpertsOf("Q8_0", "Q8_0", "Q8_0")
    with pytest.warns(UserWarning, match="KExpertsMarlin on cpu: The kernels do not compute their own gating.*KExpertsTorch takes"):
        monkeypatch.setattr("ktransformers.operators.experts_packed.gating_of", lambda experts: None)
        monkeypatch.setattr(type(experts_module(weights)), "_apply_gate", lambda *_: None, raising=False)
        assert type(layer(weights).active) is KExpertsTorch
    monkeypatch.undo()
    monkeypatch.setattr(compiler, "ON_CPU", True)
    weights.made[1][3] = random_weight("Q4_0", WIDTH, HIDDEN)
    with pytest.warns(UserWarning, match="Experts of Q.*need one type and shape, and columns in their order. KExpertsTorch takes"):
        assert type(layer(weights).active) is KExpertsTorch


def test_biases_and_a_clamped_gate(interpreter, tmp_path):
    """gpt-oss, MXFP4, gate and up in turn."""
    folder, truth = gpt_oss(tmp_path)
    rules = [{"match": {"trait": "experts"}, "replace": {"class": EXPERTS, "kwargs": {"generate_op": "KExpertsMarlin", **CPU}}}]
    model = optimize_and_load(meta_model(gpt_oss_config()), rules, folder, progress=False)
    assert type(model.model.layers[0].mlp.experts.active) is KExpertsMarlin
    ids = random_ids(1, 5, vocab=80)
    with torch.no_grad():
        assert relative_error(model(ids).logits, truth(ids).logits) < EXACT


# --- some experts on the GPU, and graphs ------------------------------------------------------------------------------

NATIVE = pytest.mark.skipif(not native.available(), reason="C library not built")


def test_hot_experts_keep_their_bits_or_are_dense(interpreter):
    weights = ExpertsOf("Q8_0", "Q8_0", "Q4_0")
    dense = layer(weights, "KExpertsTorch")
    for spec in ([0, 2, 5], 8):
        module = layer(weights, "KExpertsTorch", gpu_experts=spec, gpu_device="cpu")
        assert type(module.split.hot) is KExpertsPacked
        assert module.split.hot.experts.down.shape[0] == len(module.split.hot.ids)
        for args in (routing(3), routing(12)):
            assert relative_error(module(*args), dense(*args)) < EXACT
        module.unload()
        assert module.split.hot.experts is None and not module.split.loaded
    state = DictWeights(tiny_model("qwen3_moe").state_dict())
    module = KTransformersExperts(LAYER, state, None, experts_module(weights), **CPU, gpu_experts=2, gpu_device="cpu")
    assert type(module.split.hot) is KExpertsTorch  # floats: nothing is quantized that nobody asked for


def aside(compute, *args):
    """`compute` at once, not on the simulated GPU."""
    with _disable_current_modes():
        return compute(*args)


@pytest.mark.parametrize("seed", range(2))
def test_one_captured_graph_serves_any_input(seed, interpreter):
    packed, dense = two(random_weight("Q4_K", 40, 512))
    weights = ExpertsOf("Q8_0", "Q8_0", "Q4_0")
    experts, of_experts = layer(weights), layer(weights, "KExpertsTorch")
    x, (hidden, ids, w) = inputs(2, 512)[:, 0], routing(2)
    with torch.inference_mode():
        experts(hidden, ids, w)  # a first step, which is not captured, makes what a graph cannot
        with registered(torch.device("cpu"), SimulatedStreams(seed)) as streams, streams.running():
            with streams.capture() as graph:
                out, routed = packed(x), experts(hidden, ids, w)
            for again in range(2):
                x.normal_(), hidden.normal_(), ids.fill_(again)
                graph.replay()
                streams.wait()
                assert aside(relative_error, out, aside(dense, x)) < EXACT
                assert aside(relative_error, routed, aside(of_experts, hidden, ids, w)) < EXACT
        assert not streams.freed_too_early


@NATIVE
@pytest.mark.parametrize("seed", range(3))
def test_hot_experts_beside_those_of_the_cpu_in_one_graph(seed, interpreter, exact):
    """A pair goes to whichever part has its expert; nothing waits, so a graph holds both."""
    weights = ExpertsOf("Q8_0", "Q8_0", "Q8_0")
    module = layer(weights, "KExpertsCPU", gpu_experts=[1, 4, 6], gpu_device="cpu")
    dense = layer(weights, "KExpertsTorch")
    hidden, ids, w = routing(3)
    with torch.inference_mode(), registered(torch.device("cpu"), SimulatedStreams(seed)) as streams, streams.running():
        assert type(module.active) is KExpertsCPU
        first = module(hidden, ids, w)
        streams.wait()
        assert aside(relative_error, first, aside(dense, hidden, ids, w)) < EXACT
        with streams.capture() as graph:
            end = module.start(hidden, ids, w)
            beside = hidden * 2
            out = end() + beside
        for shift in range(2):
            ids.copy_((ids + shift) % COUNT)
            graph.replay()
            streams.wait()
            assert aside(relative_error, aside(torch.sub, out, beside), aside(dense, hidden, ids, w)) < EXACT
    assert not streams.freed_too_early


@NATIVE
def test_dense_hot_experts_cannot_be_captured(interpreter):
    """Why packed ones matter: torch's way counts the experts' tokens."""
    state = DictWeights(tiny_model("qwen3_moe").state_dict())
    module = KTransformersExperts(LAYER, state, None, experts_module(ExpertsOf("Q8_0", "Q8_0", "Q8_0")), **CPU, gpu_experts=2, gpu_device="cpu")
    module.load()
    with torch.inference_mode(), registered(torch.device("cpu"), SimulatedStreams()) as streams, streams.running():
        with pytest.raises(CaptureError), streams.capture():
            module(*routing(2))


# --- a whole model ----------------------------------------------------------------------------------------------------


def rule_file(tmp_path, linear_op, experts_op):
    path = tmp_path / f"{linear_op}.yaml"
    more = "num_bits: 8\n      group_size: 32" if linear_op == "KLinearMarlin" else ""
    path.write_text(f"""
- match:
    trait: experts
  replace:
    class: {EXPERTS}
    kwargs:
      generate_device: cuda
      generate_op: {experts_op}
      prefill_device: cuda
  recursive: False
- match:
    class: torch.nn.Linear
  replace:
    class: {LINEAR}
    kwargs:
      generate_device: cuda
      generate_op: {linear_op}
      prefill_device: cuda
      {more}
""")
    return path


@NATIVE
@pytest.mark.parametrize("family, kind, worst", [("qwen3_moe", "Q8_0", 1e-3), ("deepseek_v3", "Q4_0", 3e-2)])
def test_a_model_by_a_rule_file_says_the_same_tokens(family, kind, worst, interpreter, tmp_path):
    """DeepSeek's file has a few tensors in F16, which are quantized to 8 bits."""
    model = tiny_model(family, num_hidden_layers=2, num_experts_per_tok=2)
    quantize_folder(save(model, tmp_path / "m"), gguf := tmp_path / "model.gguf", kind)
    ids, found = random_ids(1, 3), {}
    for linear_op, experts_op in (("KLinearMarlin", "KExpertsMarlin"), ("KLinearTorch", "KExpertsTorch")):
        rules = str(rule_file(tmp_path, linear_op, experts_op))
        ours = optimize_and_load(meta_model(model.config), rules, gguf, devices={"cuda": "cpu"}, progress=False)
        assert {linear_op, experts_op} <= {type(m.active).__name__ for m in ours.modules() if hasattr(m, "active")}
        made = ours.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        found[linear_op] = made.sequences, torch.stack(made.logits)
    (tokens, logits), (of_dense, dense) = found["KLinearMarlin"], found["KLinearTorch"]
    assert torch.equal(tokens, of_dense) and relative_error(logits, dense) < worst
