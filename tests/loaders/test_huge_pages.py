"""KT_HUGE_PAGES: the same bytes in memory of their own, or one error where there is no room."""

import pytest
import torch
from safetensors.torch import save_file

from ktransformers.errors import KTransformersError, WeightError
from ktransformers.loaders import base, open_weights


@pytest.fixture()
def checkpoint(tmp_path):
    """A safetensors folder with an odd number of bytes, and its tensors."""
    tensors = {"a": torch.randn(37, 5), "b": torch.randn(3).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def test_the_same_numbers(checkpoint, monkeypatch):
    """Every tensor equals the mapped one, the memory starts at a huge page, and the file may go away."""
    folder, tensors = checkpoint
    monkeypatch.setenv("KT_HUGE_PAGES", "1")
    monkeypatch.setattr(base, "CHUNK", 64)  # several pieces
    with open_weights(folder) as weights:
        for path in weights.paths:
            assert weights._bytes[path].data_ptr() % base._HUGE == 0
            path.unlink()
        for name, value in tensors.items():
            assert torch.equal(weights.tensor(name), value)


def test_more_than_there_is(checkpoint, monkeypatch):
    """A file larger than the available memory is refused before memory is touched."""
    monkeypatch.setenv("KT_HUGE_PAGES", "1")
    monkeypatch.setattr(base, "available_memory", lambda: 100)
    with pytest.raises(WeightError, match=r"100 bytes of memory are available.*KT_HUGE_PAGES"):
        open_weights(checkpoint[0])


def test_a_bad_value(checkpoint, monkeypatch):
    """Anything but 0 and 1 is an error that says so."""
    monkeypatch.setenv("KT_HUGE_PAGES", "yes")
    with pytest.raises(KTransformersError, match="KT_HUGE_PAGES='yes'"):
        open_weights(checkpoint[0])


def test_available_memory():
    """A plausible number where the system says."""
    found = base.available_memory()
    assert found is None or found > 1 << 20
