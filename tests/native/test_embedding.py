"""Rows of packed embedding tables, against the gguf package."""

import numpy as np
import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError
from tests.native.blocks import FORMATS, random_weight, values

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_rows_are_those_of_the_table(fmt, dtype):
    cols = FORMATS[fmt][0] * 3 if FORMATS[fmt][0] > 1 else 70
    weight = random_weight(np.random.default_rng(1), fmt, 37, cols)
    ids = torch.tensor([[0, 36, 5], [5, 1, 16]])
    found = native.Embedding(weight).forward(ids, dtype)
    assert found.dtype == dtype and torch.equal(found, values(weight)[ids].to(dtype))


def test_no_ids_give_no_rows():
    table = native.Embedding(random_weight(np.random.default_rng(1), "Q8_0", 4, 64))
    assert table.forward(torch.empty(2, 0, dtype=torch.int64), torch.float32).shape == (2, 0, 64)


@pytest.mark.parametrize("ids", [[4], [-1], [0, 1 << 40]])
def test_an_id_that_is_no_row_is_refused(ids):
    table = native.Embedding(random_weight(np.random.default_rng(1), "Q8_0", 4, 64), name="embed")
    with pytest.raises(NativeError, match="embed: found ids from .* expected 0 to 3"):
        table.forward(torch.tensor(ids), torch.float32)


def test_ids_of_another_type_are_refused():
    table = native.Embedding(random_weight(np.random.default_rng(1), "Q8_0", 4, 64))
    with pytest.raises(NativeError, match="found ids of torch.float32"):
        table.forward(torch.zeros(1), torch.float32)
    with pytest.raises(NativeError, match="for torch.float64"):
        table.forward(torch.zeros(1, dtype=torch.int64), torch.float64)


def test_torch_sees_an_operator():
    table = native.Embedding(random_weight(np.random.default_rng(1), "Q8_0", 4, 64))
    ids = torch.tensor([1, 3])
    torch.library.opcheck(torch.ops.ktransformers.embedding.default, (ids, torch.bfloat16, table.number))
    compiled = torch.compile(lambda x: table.forward(x, torch.float32) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), table.forward(ids, torch.float32) * 2)
    torch._dynamo.reset()
