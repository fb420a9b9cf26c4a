"""Training beside packed weights of a GPU, without one: kernels in Triton's interpreter on the CPU, or what computes in
their stead where Triton is not there."""

import pytest

from ktransformers import optimize_and_load
from ktransformers.errors import UnsupportedError
from ktransformers.gguf_files.write import quantize_folder
from ktransformers.kernels import compiler
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.experts_packed import KExpertsPacked
from ktransformers.operators.inner_base import KExpertsBase
from ktransformers.operators.linear_packed import KLinearPacked
from tests.sft.test_peft import EXPERTS, adapted, assert_same_step
from tests.tiny import meta_model, random_ids

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = random_ids(1, 7)
ON_CPU = {"generate_device": "cpu", "prefill_device": "cpu"}


def rules(linear, experts, **kwargs):
    made = [("linear", "linear.KTransformersLinear", {"generate_op": linear}),
            ("experts", "experts.KTransformersExperts", {"generate_op": experts, **kwargs})]  # fmt: skip
    return [{"match": {"trait": trait}, "replace": {"class": f"ktransformers.operators.{name}", "kwargs": {**ON_CPU, **more}}}
            for trait, name, more in made]  # fmt: skip


@pytest.fixture(params=["kernels", "references"])
def as_gpu(request, monkeypatch):
    if request.param == "kernels":
        request.getfixturevalue("interpreter")
    monkeypatch.setattr(compiler, "why_not", lambda device: "")


@pytest.fixture
def build(checkpoint, tmp_path):
    """Call with rules: a tiny model in Q8_0 by them."""

    def make(rules, family="qwen3_moe"):
        reference, folder = checkpoint(family)
        path = tmp_path / f"{family}.gguf"
        if not path.exists():
            quantize_folder(folder, path, "Q8_0")
        return optimize_and_load(meta_model(reference.config), rules, path, default_device="cpu", progress=False)

    return make


TARGETS = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS}
PLACES = {
    "linear": ("KLinearMarlin", "KExpertsTorch", {}), "experts": ("KLinearTorch", "KExpertsMarlin", {}),
    "all": ("KLinearMarlin", "KExpertsMarlin", {}),
    "hot": ("KLinearTorch", "KExpertsTorch", {"gpu_experts": [1, 4, 6], "gpu_device": "cpu"}),
    "hot beside C": ("KLinearTorch", "KExpertsCPU", {"gpu_experts": [1, 4, 6], "gpu_device": "cpu"}),
    "all hot": ("KLinearTorch", "KExpertsCPU", {"gpu_experts": 8, "gpu_device": "cpu"}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_adapters_train_beside_packed_weights_of_a_gpu(build, place, as_gpu, exact):
    linear, experts, more = PLACES[place]
    model, truth = build(rules(linear, experts, **more)), build(rules("KLinearTorch", "KExpertsTorch"))
    inner = [m.active for m in model.modules() if hasattr(m, "active")]
    inner += [m.split.hot for m in model.modules() if getattr(m, "split", None)]
    assert any(isinstance(one, (KLinearPacked, KExpertsPacked)) for one in inner)
    assert_same_step(adapted(model, **TARGETS), adapted(truth, **TARGETS), IDS)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_pass_packed_experts(build, family, as_gpu, exact):
    """Without adapters inside, to those below; gates with limits and biases, too."""
    made = [adapted(build(rules("KLinearTorch", op), family), target_modules=["q_proj"]) for op in ("KExpertsMarlin", "KExpertsTorch")]
    assert_same_step(*made, IDS)


class NoAdapters(KExpertsBase):
    """A user's operator."""


def test_experts_that_compute_no_adapters_are_refused_when_the_adapter_is_made(build):
    model = build(rules("KLinearTorch", "KExpertsTorch"))
    experts = next(m for m in model.modules() if isinstance(m, KTransformersExperts))
    experts._inner = dict.fromkeys(experts._inner, NoAdapters(experts.key, None, None, experts.orig_module))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts: NoAdapters computes no adapters; name KExpertsCPU"):
        adapted(model, target_parameters=EXPERTS)
