"""The operator contract: shared tables, loading and unloading, classes that stay, and operators by users."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.operators import base_operator
from ktransformers.operators.base_operator import (
    BaseInjectedModule,
    FamilyOperator,
    device_of,
    load_weights,
)
from tests.dict_weights import DictWeights
from tests.tiny import meta_model, random_ids, relative_error, tiny_model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.proj = nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.bonus = 1.0

    def forward(self, x):
        return self.proj(x) * self.scale + self.offset + self.bonus


def weights_of(module, prefix="b."):
    return DictWeights({prefix + name: tensor for name, tensor in module.state_dict().items()})


def meta_block():
    with torch.device("meta"):
        return Block()


def random_block():
    block = Block()
    for tensor in block.state_dict().values():
        tensor.normal_()
    return block


def test_an_operator_keeps_the_names_and_computes_with_what_it_loads():
    truth, original = random_block(), meta_block()
    operator = BaseInjectedModule("b", weights_of(truth), None, original, "cpu")
    operator.load()
    assert list(operator.state_dict()) == list(truth.state_dict())
    assert "orig_module" not in dict(operator.named_children())
    x = torch.randn(3, 4)
    assert torch.equal(operator(x), truth(x))
    assert not operator.scale.is_meta and original.scale is operator.scale


def test_a_child_replaced_later_is_seen_by_the_original_forward():
    operator = BaseInjectedModule("b", None, None, random_block(), "cpu")
    operator.proj = nn.Identity()
    x = torch.randn(3, 4)
    assert torch.equal(operator(x), x * operator.scale + operator.offset + 1.0)


def test_generate_device_falls_back_to_prefill_device_and_train_reaches_the_original():
    operator = BaseInjectedModule("b", None, None, Block(), "cuda:1")
    assert operator.device == operator.generate_device == operator.prefill_device == "cuda:1"
    assert BaseInjectedModule("b", None, None, Block(), "cuda:1", "cpu").device == "cpu"
    assert not operator.eval().orig_module.training and operator.train().orig_module.training


def test_unload_gives_the_memory_back_and_load_brings_it_in_again():
    truth = random_block()
    operator = BaseInjectedModule("b", weights_of(truth), None, meta_block(), "cpu")
    operator.load()
    operator.unload()
    assert all(t.is_meta for t in operator.state_dict().values())
    operator.load()
    assert torch.equal(operator.proj.weight, truth.proj.weight)


def test_loading_a_tensor_of_another_shape_names_both_shapes():
    weights = DictWeights({"b.scale": torch.ones(5)})
    with pytest.raises(WeightError, match=r"b\.scale.*\[5\].*\[4\]"):
        load_weights(meta_block(), weights, "b")


def test_what_the_checkpoint_lacks_and_what_is_not_persistent_stays_on_meta():
    block = meta_block()
    load_weights(block, DictWeights({"b.scale": torch.ones(4), "b.scratch": torch.ones(4)}), "b")
    assert block.scratch.is_meta and block.proj.weight.is_meta and not block.scale.is_meta


def test_children_go_to_their_own_device_or_their_parents():
    devices = {"model": "cuda:0", "model.layers.1": "cuda:1", "lm_head": "cpu"}
    assert device_of("model.layers.1.mlp.gate", devices) == "cuda:1"
    assert device_of("model.layers.10.mlp", devices) == "cuda:0"
    assert device_of("other", devices) == "cpu"


def test_a_child_operator_loads_itself_on_the_devices_of_the_plan():
    seen = {}

    class Child(BaseInjectedModule):
        def load(self):
            seen[self.key] = self.devices[self.key]

    operator = BaseInjectedModule("b", weights_of(random_block()), None, meta_block(), "cpu")
    operator.proj = Child("b.proj", None, None, operator.proj, "cuda:3")
    load_weights(operator, operator.gguf_loader, "b", {"b": "cpu", "b.proj": "cuda:3"})
    assert seen == {"b.proj": "cuda:3"}


def test_a_family_operator_is_an_instance_of_both_classes_and_copies_plain_attributes():
    class Twin(FamilyOperator):
        pass

    original = random_block()
    original.bonus = 7.0
    twin = Twin("b", None, None, original, "cpu")
    assert isinstance(twin, Twin) and isinstance(twin, Block) and type(twin).__name__ == "Twin"
    assert twin.bonus == 7.0 and list(twin.state_dict()) == list(original.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), original(x))
    assert type(Twin("b", None, None, original, "cpu")) is type(twin)


def test_a_users_operator_with_a_load_of_its_own_takes_part_in_a_model():
    class Doubled(BaseInjectedModule):
        """Holds its weight in an attribute, as the tutorial's operators do."""

        adopts = False

        def __init__(self, key, gguf_loader, config, orig_module=None, generate_device="cuda", **kwargs):
            super().__init__(key, gguf_loader, config, orig_module, generate_device, **kwargs)

        def load(self):
            self.half = self.gguf_loader.tensor(self.key + ".weight", device=self.device) / 2

        def forward(self, x):
            return x @ (2 * self.half).T

    truth = tiny_model("qwen3_moe")
    model, weights = meta_model(truth.config), DictWeights(truth.state_dict())
    attention = model.model.layers[1].self_attn
    attention.o_proj = Doubled(
        "model.layers.1.self_attn.o_proj", weights, model.config, attention.o_proj, "cpu"
    )
    load_weights(model, weights)
    model.model.rotary_emb = copy.deepcopy(truth.model.rotary_emb)
    with torch.no_grad():
        assert relative_error(model(random_ids(1, 5)).logits, truth(random_ids(1, 5)).logits) < 1e-5


def test_a_notice_is_given_once():
    with pytest.warns(UserWarning, match="only once"):
        base_operator.warn_once("only once, for the test")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base_operator.warn_once("only once, for the test")


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=str
)
def test_a_model_with_operators_says_that_it_cannot_be_copied(copying):
    model = nn.Sequential(random_block())
    copying(model)
    model[0] = BaseInjectedModule("b", weights_of(model[0]), None, model[0], "cpu")
    with pytest.raises(UnsupportedError, match="b: a model with operators cannot be copied or pickled.*again"):
        copying(model)
    torch.save(model.state_dict(), io.BytesIO())
