"""What decides the numbers of a loaded model, in 32 bytes: the key under which a prefix cache keeps what it computed.

Two models of one fingerprint may share keys and values; whatever may change them changes it: config, checkpoint, which
operator computes what and how, parameters that were set after loading, how the cache keeps tokens, the instruction set
of the C library. Where the checkpoint lies and which line of which rule file did what is not in it. A checkpoint is not
read whole: its headers, and some bytes of each tensor.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ktransformers
from ktransformers import native
from ktransformers.engine.block_files import FORMAT
from ktransformers.loaders import ModelWeights, WeightFiles, open_weights
from ktransformers.operators.base_operator import PLAIN
from ktransformers.operators.paged_cache import kept_sizes, paged_cache

SAMPLE = 64
"""Bytes that are looked at in the middle of each stored tensor."""
_PLACES = frozenset({"rule", "name_or_path", "_name_or_path", "transformers_version"})
"""Settings that say where something came from."""


def fingerprint(model: nn.Module, weights_path: str | Path | None = None, extra: bytes = b"") -> bytes:
    """The fingerprint of `model`, taken after loading and before it computes anything.

    `weights_path`: its checkpoint; None is what it was loaded from, and nothing where it was not loaded by this
    package. `extra`: what else decides numbers, such as the names of adapters. Raises WeightError where the checkpoint
    cannot be opened, and OSError.
    """
    digest = hashlib.blake2b(extra, digest_size=32, person=b"kt numbers")
    for part in _described(model):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    for tensor in _sampled_tensors(model):
        digest.update(tensor)
    loader = getattr(model, "gguf_loader", None)
    if weights_path is not None:
        with open_weights(weights_path) as files:
            _add_files(digest, files)
    elif isinstance(loader, ModelWeights):
        _add_files(digest, loader.files)
    return digest.digest()


def _described(model: nn.Module) -> Iterator[Any]:
    yield FORMAT, ktransformers.__version__, transformers.__version__, native.isa()
    config = getattr(model, "config", None)
    yield _without_places(config.to_dict()) if hasattr(config, "to_dict") else None
    yield getattr(config, "_attn_implementation", None), str(getattr(model, "dtype", None))
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)}
        yield name, f"{type(module).__module__}.{type(module).__qualname__}", _without_places(settings)
    cache = paged_cache(model)
    for layer in [] if cache is None else cache.layers:
        yield type(layer).__name__, [getattr(layer, name, None) for name in ("window", "kind", "joined")]
    yield sorted(kept_sizes(model).items())


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_places(each) for key, each in value.items() if key not in _PLACES}
    return [_without_places(each) for each in value] if isinstance(value, (list, tuple)) else value


def _sampled_tensors(model: nn.Module) -> Iterator[bytes]:
    """Name, form and some numbers of each parameter and buffer: an adapter's, or one that was set, is in no file."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        if tensor.numel() and not tensor.is_meta:
            yield _middle(tensor.detach())


def _middle(tensor: Tensor) -> bytes:
    while tensor.dim() > 1:
        tensor = tensor[tensor.shape[0] // 2]
    tensor = tensor.reshape(-1)
    start = max(tensor.numel() // 2 - 8, 0)
    return tensor[start : start + 16].contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _add_files(digest: Any, files: WeightFiles) -> None:
    """Sizes, headers, and the middle of each tensor."""
    infos = [files.info(name) for name in sorted(files.names())]
    for number, path in enumerate(files.paths):
        stored = [info for info in infos if info.file == path and info.nbytes]
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"file {number} {size}\n".encode())
            digest.update(file.read(min((info.start for info in stored), default=size)))
            for info in stored:
                file.seek(info.start + max(info.nbytes - SAMPLE, 0) // 2)
                digest.update(file.read(min(SAMPLE, info.nbytes)))
