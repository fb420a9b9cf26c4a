"""Embedding tables as operators: packed on the CPU, dense elsewhere and for a family's own kind."""

import pytest
import torch
from torch import nn

from ktransformers import native
from ktransformers.operators.embedding import KTransformersEmbedding
from tests.dict_weights import DictWeights

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")
KEY = "model.embed_tokens"


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


def table(kind=nn.Embedding, types=None, dtype=torch.float32):
    torch.manual_seed(0)
    truth = kind(40, 64, dtype=dtype)
    weights = DictWeights({f"{KEY}.weight": truth.weight.detach()}, types)
    operator = KTransformersEmbedding(KEY, weights, None, kind(40, 64, dtype=dtype, device="meta"), "cpu")
    operator.load()
    return truth, operator, weights


@pytest.mark.parametrize("stored", [None, "Q8_0", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_from_what_is_stored(stored, dtype):
    _, operator, weights = table(types={f"{KEY}.weight": stored} if stored else None, dtype=dtype)
    ids = torch.tensor([[3, 39], [0, 3]])
    found = operator(ids)
    assert found.dtype == dtype and torch.equal(found, weights.tensor(f"{KEY}.weight", dtype=dtype)[ids])
    assert isinstance(operator, nn.Embedding) and not list(operator.parameters())
    assert operator.weight.shape == (40, 64) and operator.weight.device == ids.device and operator.weight.dtype == dtype
    with pytest.raises(AttributeError, match="packed bytes and has no dense weight, so it has no 'T'"):
        operator.weight.T  # noqa: B018
    operator.unload()
    operator.load()
    assert torch.equal(operator(ids), found)


def test_rows_come_in_the_dtype_that_the_model_is_moved_to():
    _, operator, weights = table(types={f"{KEY}.weight": "Q8_0"})
    ids = torch.tensor([3, 39])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(operator.to(dtype)(input=ids), weights.tensor(f"{KEY}.weight", dtype=dtype)[ids])


@torch.no_grad()
def test_a_familys_own_kind_stays_its_own():
    truth, operator, _ = table(Scaled)
    ids = torch.tensor([1, 2])
    assert torch.equal(operator(ids), truth(ids)) and operator.weight.shape == (40, 64)


def test_what_is_no_table_is_refused():
    assert "replaces an embedding table, found Linear" in KTransformersEmbedding.check("x", nn.Linear(2, 2), {})[0]
