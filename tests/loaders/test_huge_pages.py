"""KT_HUGE_PAGES: the same bytes in memory of their own, or one error where there is no room."""

import pytest
import torch
from safetensors.torch import save_file

from ktransformers.errors import KTransformersError, WeightError
from ktransformers.loaders import base, open_weights
from ktransformers.machine import system


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
    monkeypatch.setattr(base, "READ_BYTES", 64)  # several pieces
    with open_weights(folder) as weights:
        for path in weights.paths:
            assert weights._bytes[path].data_ptr() % base._HUGE == 0
            path.unlink()
        for name, value in tensors.items():
            assert torch.equal(weights.tensor(name), value)


def test_more_than_there_is(checkpoint, monkeypatch):
    """A file larger than the available memory is refused before memory is touched."""
    monkeypatch.setenv("KT_HUGE_PAGES", "1")
    monkeypatch.setattr(base, "memory", lambda: (1000, 100))
    with pytest.raises(WeightError, match=r"100 bytes of memory are available.*KT_HUGE_PAGES"):
        open_weights(checkpoint[0])


def test_a_container_with_less_memory_than_its_machine(checkpoint, monkeypatch, tmp_path_factory):
    """The limit of the cgroup counts, whatever /proc/meminfo shows of the machine."""
    root = tmp_path_factory.mktemp("root")
    for name, text in {
        "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 50331648 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "600",
        "sys/fs/cgroup/memory.current": "500",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setenv("KT_HUGE_PAGES", "1")
    monkeypatch.setattr(base, "memory", lambda: system.memory(root))
    with pytest.raises(WeightError, match=r" 100 bytes of memory are available"):
        open_weights(checkpoint[0])


def test_a_bad_value(checkpoint, monkeypatch):
    """Anything but 0 and 1 is an error that says so."""
    monkeypatch.setenv("KT_HUGE_PAGES", "yes")
    with pytest.raises(KTransformersError, match="KT_HUGE_PAGES='yes'"):
        open_weights(checkpoint[0])
