"""Kernels run in Triton's interpreter here."""

import pytest

from ktransformers.kernels import compiler


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels are launched on the CPU. Skips where Triton is not there."""
    if compiler.triton is None:
        pytest.skip("Triton is not installed")
    if not compiler.triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=0 in the environment")
    monkeypatch.setattr(compiler, "ON_CPU", True)
