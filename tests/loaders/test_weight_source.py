"""Whoever stands in for open weights answers what operators ask, under the same argument names."""

import inspect

import pytest
import torch

from ktransformers.loaders import ModelWeights, WeightSource
from ktransformers.simulator.fake_weights import FakeWeights
from tests.dict_weights import DictWeights

QUESTIONS = sorted(name for name, member in vars(WeightSource).items() if inspect.isfunction(member) and name[0] != "_")


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("source", [ModelWeights, FakeWeights, DictWeights])
def test_every_source_answers_every_question(source, question):
    wanted = [(p.name, p.default) for p in inspect.signature(getattr(WeightSource, question)).parameters.values()]
    answered = [(p.name, p.default) for p in inspect.signature(getattr(source, question)).parameters.values()]
    assert answered[: len(wanted)] == wanted


def test_dict_weights_is_a_source():
    source = DictWeights({"a.weight": torch.ones(4, 32)}, {"a.weight": "Q4_0"})
    assert isinstance(source, WeightSource) and source.nbytes("a.weight") == 4 * 18
