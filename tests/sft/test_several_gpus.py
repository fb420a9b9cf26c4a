"""Training on a model that lives on several GPUs: the gradients of one device, and every module where its rule says."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ktransformers import optimize_and_load
from ktransformers.sft.whole import unfreeze
from tests.sft.test_peft import EXPERTS, adapted, trained
from tests.simulated_devices import place_of, several_gpus
from tests.tiny import meta_model, random_ids, relative_error

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen = {name: tensor.grad.detach().clone() for name, tensor in trained(model).items()}


def one_step(model, folder):
    """(loss, gradients, parameters afterwards) of a step of the stock Trainer."""
    rows, gradients = [{"input_ids": ids, "labels": ids} for ids in random_ids(2, 16)], Gradients()
    how = TrainingArguments(str(folder), max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", report_to="none",
                            use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, how, train_dataset=rows, callbacks=[gradients])
    loss = trainer.train().training_loss
    return loss, gradients.seen, {name: tensor.detach().clone() for name, tensor in trained(model).items()}


ADAPTERS = {"target_modules": "all-linear", "target_parameters": EXPERTS}
RULES = {"qwen3_moe": "MoE", "deepseek_v3": "MLA"}


def by_rules(reference, folder):
    """The model by packaged rules, on what GPUs there are."""
    rules = RULES[reference.config.model_type]
    return optimize_and_load(meta_model(copy.deepcopy(reference.config)), rules, folder, progress=False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Trainers take cuda:0 for the device of what they give a model, as where there is one."""
    asked = TrainingArguments.device.fget
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: asked(self) and torch.device("cuda:0")))


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize(("count", "whole"), [(1, False), (2, False), (2, True)])
def test_a_step_of_the_stock_trainer_gives_the_gradients_of_one_device(checkpoint, exact, family, count, whole, tmp_path, request):
    reference, folder = checkpoint(family)
    truth = copy.deepcopy(reference)
    truth = one_step(truth.requires_grad_(True) if whole else adapted(truth, **ADAPTERS), tmp_path)
    request.getfixturevalue("on_a_gpu")
    with several_gpus(count) as gpus:
        model = by_rules(reference, folder)
        assert len({place for place in model.hf_device_map.values() if place != "cpu"}) == count
        if whole:
            unfreeze(model)
        else:
            model = adapted(model, **ADAPTERS)
        found = one_step(model, tmp_path)
        places = {name: str(place_of(p)) for name, p in model.named_parameters()}
    assert set(places.values()) == {"cpu", *(f"cuda:{i}" for i in range(count))}
    assert all(place == "cpu" for name, place in places.items() if ".experts." in name)  # where they are computed
    assert ("cuda:0", "cuda:1") in gpus.crossed or count == 1
    assert abs(found[0] - truth[0]) < 1e-5
    for which in (1, 2):
        assert found[which].keys() == truth[which].keys()
        for name, expected in truth[which].items():
            if expected.abs().max() > 1e-6:
                assert relative_error(found[which][name].as_subclass(torch.Tensor), expected) < 1e-4, name


def test_with_gradients_outputs_are_where_inputs_were(checkpoint):
    """As accelerate's are; what generates takes logits from where they are."""
    ids = random_ids(1, 6)
    with several_gpus(2):
        model = by_rules(*checkpoint("qwen3_moe"))
        out = model(input_ids=ids.to("cuda:0"), labels=ids.to("cuda:0"))
        assert {place_of(out.loss), place_of(out.logits)} == {torch.device("cuda:0")}
        with torch.no_grad():
            assert place_of(model(input_ids=ids.to("cuda:0")).logits) == torch.device("cuda:1")


def test_the_simulation_refuses_to_mix_devices():
    with several_gpus(2):
        here, there = torch.ones(2, 2, device="cuda:0"), torch.ones(2, 2).to("cuda:1")
        assert (str(here.device), str((here @ here).device), str(here.cpu().device)) == ("cuda:0", "cuda:0", "cpu")
        for one, other in ((here, there), (there, torch.ones(2, 2))):
            with pytest.raises(RuntimeError, match="same device"):
                one @ other
        x = torch.ones(2, 2, requires_grad=True)
        (x.to("cuda:0").to("cuda:1") * 3).cpu().sum().backward()
        assert torch.equal(x.grad, torch.full((2, 2), 3.0))
