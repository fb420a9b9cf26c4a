"""Linear operators: the result of torch, one weight for both stages, names old and new, authors' classes."""

import warnings

import pytest
import torch
from torch import nn

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.operators import base_operator, linear
from ktransformers.operators.base_operator import BaseInjectedModule, InferenceState
from ktransformers.operators.linear import (
    KLinearBase,
    KLinearCPUInfer,
    KLinearTorch,
    KTransformersLinear,
    LinearTorchInject,
)
from tests.dict_weights import DictWeights

KEY = "model.layers.0.proj"
CPU = {"generate_device": "cpu", "prefill_device": "cpu"}


def pair(bias=True, dtype=torch.float32, types=None, shape=(48, 64)):
    """(loaded nn.Linear as truth, the same on meta, its weights)."""
    torch.manual_seed(0)
    truth = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    weights = DictWeights({f"{KEY}.{name}": t for name, t in truth.state_dict().items()}, types)
    return truth, nn.Linear(shape[1], shape[0], bias, "meta", dtype), weights


def loaded(operator, meta, weights, **kwargs):
    module = operator(KEY, weights, None, meta, **kwargs)
    module.load()
    return module


@pytest.fixture
def fresh_notices():
    saved = set(base_operator._told)
    base_operator._told.clear()
    yield
    base_operator._told |= saved


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["KLinearTorch", "KLinearCPUInfer", None])
def test_every_operator_equals_torch_in_fp32(name, bias):
    truth, meta, weights = pair(bias)
    module = loaded(KTransformersLinear, meta, weights, generate_op=name, **CPU)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), truth(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantized_weight_equals_its_dequantized_self(kind):
    _, meta, weights = pair(False, types={f"{KEY}.weight": kind})
    module = loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)
    assert torch.equal(module.weight, weights.tensor(f"{KEY}.weight"))


def test_the_cpu_operator_computes_a_quantized_weight():
    _, meta, weights = pair(types={f"{KEY}.weight": "Q8_0"})
    x = torch.randn(3, 64)
    with torch.no_grad():
        found = loaded(KTransformersLinear, meta, weights, generate_op="KLinearCPUInfer", **CPU)(x)
        expected = loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)(x)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # inputs may be rounded to 8 bits


def test_torch_keeps_the_models_dtype_and_the_inputs_dtype():
    _, meta, weights = pair(dtype=torch.bfloat16)
    module = loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)
    assert module.weight.dtype == torch.bfloat16
    assert module(torch.randn(2, 64)).dtype == torch.float32


def test_the_torch_operator_shows_its_weight_as_nn_linear_does_and_to_moves_it():
    _, meta, weights = pair()
    module = loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)
    assert [name for name, _ in module.named_parameters()] == [
        "weight",
        "bias",
    ] and not module.weight.requires_grad
    before = module(torch.ones(1, 64))
    module.to(torch.float64)
    assert module.weight.dtype == torch.float64
    torch.testing.assert_close(module(torch.ones(1, 64)), before)


def test_the_cpu_operator_has_nothing_that_to_could_move():
    _, meta, weights = pair()
    module = loaded(KTransformersLinear, meta, weights, generate_op="KLinearCPUInfer", **CPU)
    assert not module.state_dict() and not list(module.children())


def test_one_weight_serves_both_stages_unless_two_operators_are_asked_for():
    truth, meta, weights = pair()
    one = KTransformersLinear(KEY, weights, None, meta, "cpu", "KLinearTorch", "cpu", "KLinearTorch")
    assert one._inner[InferenceState.PREFILL] is one._inner[InferenceState.GENERATE]
    two = KTransformersLinear(KEY, weights, None, meta, "cpu", "KLinearCPUInfer", "cpu", "KLinearTorch")
    two.load()
    x = torch.randn(4, 64)
    with torch.no_grad():
        for mode, kind in (
            (InferenceState.PREFILL, KLinearTorch),
            (InferenceState.GENERATE, KLinearCPUInfer),
        ):
            two.set_inference_mode(mode)
            assert isinstance(two.active, kind) and two.mode is mode
            torch.testing.assert_close(two(x), truth(x), rtol=1e-5, atol=1e-5)
    two.set_inference_mode(InferenceState.PREFILL)
    assert two._inner[InferenceState.GENERATE].linear is None
    two.unload()
    assert two.mode is InferenceState.UNLOAD and not list(two.parameters())
    two.set_inference_mode(InferenceState.GENERATE)
    assert two.active.linear is not None


def test_without_a_name_the_cpu_takes_torch_for_a_type_the_library_does_not_compute(monkeypatch):
    _, meta, weights = pair()
    monkeypatch.setattr(linear.native, "SUPPORTED_TYPES", frozenset({"Q8_0"}))
    assert isinstance(KTransformersLinear(KEY, weights, None, meta, **CPU).active, KLinearTorch)
    problems = KTransformersLinear.check(KEY, meta, {"generate_op": "KLinearCPUInfer", **CPU}, weights)
    assert len(problems) == 1 and "F32" in problems[0] and "KLinearTorch" in problems[0]


@pytest.mark.parametrize("name", ["KLinearMarlin", "QuantizedLinearMarlin", "KLinearFP8", "VLinearMarlin"])
def test_a_gpu_operator_gives_way_on_the_cpu_with_one_notice(name, fresh_notices):
    _, meta, weights = pair()
    with pytest.warns(UserWarning, match="takes its place"):
        module = KTransformersLinear(KEY, weights, None, meta, "cpu", name, "cpu")
    assert isinstance(module.active, KLinearCPUInfer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KTransformersLinear(KEY, weights, None, meta, "cpu", name, "cpu")


def test_an_obsolete_name_is_accepted_with_a_warning_naming_todays(fresh_notices):
    _, meta, weights = pair()
    with pytest.warns(UserWarning, match="'QuantizedLinearMarlin' is obsolete, today's is 'KLinearMarlin'"):
        KTransformersLinear(KEY, weights, None, meta, "cpu", "QuantizedLinearMarlin", "cpu")


@pytest.mark.parametrize("name", ["KLinearQ8", "KLinearIPEXLLM"])
def test_a_gpu_operator_that_is_not_built_is_computed_by_torch_and_says_so(name, fresh_notices):
    _, meta, weights = pair()
    assert KTransformersLinear.check(KEY, meta, {"generate_op": name, "generate_device": "cuda"}, weights) == []
    with pytest.warns(UserWarning, match=f"{name} on cuda: its GPU kernel is not built yet; KLinearTorch takes its place"):
        module = KTransformersLinear(KEY, weights, None, meta, "cuda", name)
    assert isinstance(module.active, KLinearTorch) and str(module.active.device) == "cuda"


def test_check_lists_what_does_not_fit():
    _, meta, weights = pair()
    check = KTransformersLinear.check
    assert check(KEY, meta, {"generate_op": "KLinearMarlin", "prefill_op": "None", **CPU}, weights) == []
    router = type("Router", (nn.Linear,), {"forward": lambda self, x: (x, x)})(2, 2)
    for operator in (KTransformersLinear, LinearTorchInject):
        assert "found LayerNorm" in operator.check(KEY, nn.LayerNorm(4), {}, weights)[0]
        assert "found Router, which computes more" in operator.check(KEY, router, {}, weights)[0]
    problems = check(KEY, meta, {"generate_op": "KLinearTorhc", "prefill_op": "KLinear", **CPU}, weights)
    assert len(problems) == 2 and "did you mean 'KLinearTorch'" in problems[0]
    problems = check(KEY, meta, {"generate_op": "KLinearCPUInfer", "generate_device": "cuda"}, weights)
    assert len(problems) == 1 and "generate_device is 'cuda'; set generate_device: cpu" in problems[0]


def test_a_weight_of_another_shape_is_refused_by_name():
    _, meta, weights = pair()
    weights.tensors[f"{KEY}.weight"] = torch.zeros(48, 63)
    with pytest.raises(WeightError, match=r"proj\.weight.*\[48, 63\].*\[48, 64\]"):
        loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)


@pytest.mark.parametrize("op", ["KLinearTorch", "KLinearCPUInfer"])
def test_the_gradient_of_the_input(op):
    truth, meta, weights = pair()
    x = torch.randn(2, 3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(truth(x).square().sum(), x)
    (found,) = torch.autograd.grad(loaded(KTransformersLinear, meta, weights, generate_op=op, **CPU)(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_the_tutorials_operator_equals_torch(bias):
    truth, meta, weights = pair(bias)
    module = loaded(LinearTorchInject, meta, weights, generate_device="cpu", my_param=False)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(module(x), truth(x), rtol=1e-5, atol=1e-5)
    assert module.my_param is False and (module.bias is not None) is bias
    assert module(x.double()).dtype == torch.float64
    module.unload()
    assert module.w is None and not any(t.is_meta for t in module.state_dict().values())
    module.load(w=(truth.weight, truth.bias) if bias else truth.weight)
    torch.testing.assert_close(module(x), truth(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_an_authors_class_in_the_tutorials_call_shape_works(bias):
    """The mixin is initialized without arguments, plain tensors are assigned to `bias`, load takes w and
    device.
    """

    class Transposed(BaseInjectedModule, KLinearBase):
        def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", **kwargs):
            super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)
            KLinearBase.__init__(self)
            self.has_bias = False
            self.w = None

        def load(self, w=None, device=None):
            w = self.load_weight(device=device or self.device) if w is None else w
            self.has_bias = isinstance(w, tuple)
            weight = w[0] if self.has_bias else w
            assert isinstance(weight, nn.Parameter)
            self.w = weight.view(self.out_features, self.in_features).T
            if self.has_bias:
                self.bias = w[1].to(torch.get_default_dtype())

        def forward(self, x):
            return x @ self.w + self.bias if self.has_bias else x @ self.w

    truth, meta, weights = pair(bias)
    module = Transposed(KEY, weights, None, meta, generate_device="cpu")
    module.load()
    x = torch.randn(2, 64)
    torch.testing.assert_close(module(x), truth(x), rtol=1e-5, atol=1e-5)
    assert module.device == "cpu" and (module.in_features, module.out_features) == (64, 48)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", [None, "Q8_0"])
def test_the_weight_of_packed_bytes_can_be_read_and_not_written(bias, stored):
    _, meta, weights = pair(bias, types={f"{KEY}.weight": stored} if stored else None)
    module = loaded(KTransformersLinear, meta, weights, generate_op="KLinearCPUInfer", **CPU)
    dense = loaded(KTransformersLinear, meta, weights, generate_op="KLinearTorch", **CPU)
    weight, x = module.weight, torch.randn(3, 64)
    assert weight.shape == (48, 64) and weight.dtype == torch.float32 and weight.device == torch.device("cpu")
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, dense.weight))
    assert torch.equal(weight[5:9].t() * 1, dense.weight[5:9].t()) and torch.equal(weight[5:9][1:].to(torch.float64) + 0, dense.weight[6:9].double())
    assert torch.equal(weight[:, 3:5] + 0, dense.weight[:, 3:5]) and torch.equal(weight[2] + 0, dense.weight[2])
    for write in (lambda: weight.add_(1), lambda: weight.data.mul_(2), lambda: torch.add(x, 1, out=weight[:3])):
        with pytest.raises(UnsupportedError, match=f"{KEY}.weight: computes from packed bytes, which cannot be changed.*KLinearTorch"):
            write()
    assert not list(module.parameters()) and not module.state_dict()
    assert hasattr(module, "bias") == (not bias) and getattr(module, "bias", None) is None
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        module.wieght  # noqa: B018
    assert dense.weight.shape == (48, 64) and (dense.bias is not None) is bias


def test_float64_is_refused_before_loading_and_goes_to_torch_where_nothing_is_named():
    truth, meta, weights = pair(dtype=torch.float64)
    weights = DictWeights({name: t.float() for name, t in weights.tensors.items()})
    check = KTransformersLinear.check
    for source in (weights, None):
        (problem,) = check(KEY, meta, {"generate_op": "KLinearCPUInfer", **CPU}, source)
        assert "does not compute float64" in problem and "use KLinearTorch" in problem
    assert check(KEY, meta, {"generate_op": "KLinearTorch", **CPU}, weights) == check(KEY, meta, CPU, weights) == []
    module = loaded(KTransformersLinear, meta, weights, **CPU)
    x = torch.randn(2, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), truth(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table", ["LINEAR_MAP", "EXPERTS_MAP"])
def test_every_inner_operator_keeps_the_contract(table):
    from ktransformers.operators import experts, linear
    from ktransformers.operators.inner_ops import InnerOperator

    original = nn.Linear(4, 4, bias=False, device="meta")
    for operator in getattr(linear if table == "LINEAR_MAP" else experts, table).values():
        assert isinstance(operator("a", None, None, original, "cpu"), InnerOperator)
    assert not isinstance(original, InnerOperator)
