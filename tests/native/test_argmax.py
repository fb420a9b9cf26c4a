"""The largest of many numbers, against torch's."""

import pytest
import torch

from ktransformers import native
from ktransformers.errors import NativeError

pytestmark = pytest.mark.skipif(not native.available(), reason="C library not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 15, 1023, 1024, 1025, 9000])
def test_it_is_the_first_of_the_largest(dtype, count):
    for seed in range(8):
        x = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert native.argmax(x) == int((x == x.max()).nonzero()[0, 0])
        assert native.argmax(-x.abs()) == int((x.abs() == x.abs().min()).nonzero()[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_finite_number(dtype):
    x = torch.full((3000,), -torch.inf, dtype=dtype)
    assert native.argmax(x) == 0
    x[2500] = -1e30
    assert native.argmax(x) == 2500
    x[1700] = x[2900] = torch.inf
    assert native.argmax(x) == 1700
    x[2200] = x[2201] = torch.nan
    assert native.argmax(x) == int(x.argmax()) == 2200


def test_what_is_no_vector_of_floats_is_refused():
    for wrong in (torch.zeros(0), torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(NativeError, match="argmax: found"):
            native.argmax(wrong)
