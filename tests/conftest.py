"""Fixtures for all tests."""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")  # tests/kernels: to be set before torch._dynamo imports Triton

import pytest
import torch

from ktransformers import native
from tests.fast import mark_slow
from tests.tiny import FAMILIES, save, tiny_model

torch.set_num_threads(1)  # at these sizes threads cost more than they give
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and their children ignore Ctrl-C


def pytest_collection_modifyitems(items):
    mark_slow(items)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Call with a family and config overrides: (transformers' model, its checkpoint's folder), made once."""
    made = {}

    def make(family: str, **overrides):
        key = (family, repr(sorted(overrides.items())))
        if key not in made:
            model = tiny_model(family, **overrides)
            made[key] = model, save(model, tmp_path_factory.mktemp(family))
        return made[key]

    return make


@pytest.fixture
def exact():
    """The C library in fp32 throughout, so that any difference is a fault and not rounding."""
    native.set_exact(True)
    yield
    native.set_exact(False)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """Each of the five families in turn."""
    return request.param
