"""Fixtures for all tests."""

import os
import signal

os.environ.setdefault("TRITON_INTERPRET", "1")  # `interpreter`: to be set before torch._dynamo imports Triton

import pytest
import torch

from ktransformers import native
from ktransformers.kernels import compiler
from tests.fast import mark_slow
from tests.tiny import FAMILIES, save, tiny_model

torch.set_num_threads(1)  # at these sizes threads cost more than they give
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and their children ignore Ctrl-C


def pytest_collection_modifyitems(items):
    mark_slow(items)


@pytest.fixture
def interpreter(monkeypatch):
    """The kernels of GPUs are launched on the CPU, in Triton's interpreter. Skips where Triton is not there."""
    if compiler.triton is None:
        pytest.skip("Triton is not installed")
    if not compiler.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=0 in the environment")
    monkeypatch.setattr(compiler, "ON_CPU", True)


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
