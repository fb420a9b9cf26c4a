"""Adapters from where a user has them, a PEFT folder or a GGUF LoRA file: read, or put onto a loaded model.

Needs PEFT only to put one onto a model.
"""

import copy
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ktransformers.configs import meta_model
from ktransformers.errors import UnsupportedError, WeightError, join_errors
from ktransformers.gguf_files.lora import is_gguf_lora, read_gguf_lora
from ktransformers.loaders.lora import Adapter
from ktransformers.loaders.peft_files import CONFIG, WEIGHTS, is_adapter_folder, read_peft, write_peft
from ktransformers.operators.trained import untrainable
from ktransformers.paths import existing_path


def read_adapter(path: str | Path, model: Any, config: Any) -> Adapter:
    """The adapter at `path` by the names of `model`, on the meta device. Raises WeightError, UnsupportedError."""
    path = adapter_path(path)
    return read_gguf_lora(path, model, config) if is_gguf_lora(path) else read_peft(path, model)


def adapter_path(path: str | Path) -> Path:
    """`path`, checked to be an adapter by its looks. Raises WeightError."""
    if not str(path) or (found := existing_path(path, "adapter", WeightError)) is None:
        raise WeightError(f"adapter {str(path)!r}: no such file or folder. Check the path.")
    if found.is_dir() and not is_adapter_folder(found):
        inner = sorted(sub.parent.name for sub in found.glob(f"*/{CONFIG}"))
        step = f"Give {found / inner[-1]}" if inner else "Give the folder that PEFT's save_pretrained wrote"
        raise WeightError(f"adapter {found}: no {CONFIG} in it. {step}, or a GGUF LoRA file.")
    if found.is_file() and not is_gguf_lora(found):
        raise WeightError(f"adapter {found}: expected a PEFT folder with {CONFIG}, or a GGUF LoRA file NAME.gguf.")
    return found


def identity_of(path: str | Path) -> bytes:
    """What tells the adapter at `path` from all others, by its contents: 32 bytes. Raises WeightError."""
    path = adapter_path(path)
    digest = hashlib.blake2b(digest_size=32, person=b"kt adapter")
    for file in [path / CONFIG, path / WEIGHTS] if path.is_dir() else [path]:
        try:
            with open(file, "rb") as opened:
                digest.update(os.fstat(opened.fileno()).st_size.to_bytes(8, "little"))
                while part := opened.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise WeightError(f"adapter {file}: cannot be read: {error.strerror}. Save the adapter again.") from error
    return digest.digest()


def load_adapter(model: Any, path: str | Path) -> Any:
    """Put the adapter at `path` onto a loaded model: a PeftModel in eval mode.

    Weights stay packed, the adapter is computed beside them. `get_base_model()` of the result is `model`, adapted.
    Raises WeightError for an adapter of another base, with all that does not fit, and UnsupportedError without PEFT.
    """
    path = adapter_path(path)
    if find_spec("peft") is None:
        raise UnsupportedError("An adapter is put onto a model by PEFT, which is not installed: pip install peft")
    config = copy.deepcopy(model.config)
    shapes = meta_model(config)
    adapter = read_adapter(path, shapes, config)
    _refuse_whole(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        if is_gguf_lora(path):
            write_peft(adapter, Path(folder), shapes)
            path = Path(folder)
        adapted = _by_peft(model, path, adapter.path)
    _check_all_there(adapted, adapter)
    return adapted.eval()


def _refuse_whole(model: Any, adapter: Adapter) -> None:
    """What was trained whole takes the place of weights in floats alone, as when it was trained."""
    modules = {name.rpartition(".")[0] for name in adapter.replaced}
    if packed := sorted(name for name in modules if untrainable(model.get_submodule(name))):
        raise UnsupportedError(
            f"{adapter.path}: {', '.join(packed[:6])}: trained whole, and computed from quantized bytes here. Make a "
            "checkpoint of both with `kt merge`, or leave these modules to transformers (class: default)."
        )


def _by_peft(model: Any, folder: Path, given: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(), _placed_already(model):
        warnings.simplefilter("ignore")  # what does not fit is told by the checks before and after
        try:
            return PeftModel.from_pretrained(model, str(folder))
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise WeightError(f"{given}: PEFT cannot put it onto {type(model).__name__}: {error}") from error


@contextmanager
def _placed_already(model: Any) -> Iterator[None]:
    """PEFT would place a model with a device map anew, by hooks around forwards: steps would go module by module."""
    places = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if places is not None:
            model.hf_device_map = places


def _check_all_there(adapted: Any, adapter: Adapter) -> None:
    """PEFT leaves out what it finds no place for."""
    pairs = sum(name.endswith(("lora_B.default.weight", "lora_embedding_B.default")) for name in _names(adapted))
    if pairs != len(adapter.changes):
        raise join_errors(
            WeightError, f"{adapter.path}: of the {len(adapter.changes)} tensors that it adapts PEFT reached {pairs}:",
            ["merge it with `kt merge`, which reads names without PEFT"],
        )  # fmt: skip


def _names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]
