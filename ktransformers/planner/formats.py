"""How many bytes a weight takes in a checkpoint: as published, in another format, or by the checkpoint's own headers.

A `Format` answers for one tensor of the model at a time, in module names. Nothing here reads tensors, but two that the
config ties and a checkpoint holds both, as loading does; what a format's
bytes mean is in quants/blocks.py and quants/scaled.py.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ktransformers.checks import check_weights
from ktransformers.configs import model_path, text_config
from ktransformers.errors import KTransformersError, did_you_mean
from ktransformers.gguf_files.write import choose_type
from ktransformers.kernels.layouts import GGUF_TYPES, SCALED_TYPES, Layout, layout_of, scaled_layout
from ktransformers.loaders import bind, open_weights
from ktransformers.operators.on_gpu import layout_of_infos
from ktransformers.quants.blocks import QUANT_TYPES


@dataclass(frozen=True)
class _Apart:
    """A format of safetensors, whose scales lie apart: the type as native.py calls it, bytes a weight, and the scales:
    one for so many columns (0: for a row), of which type, and whether there are zero points."""

    type: str
    nbytes: float
    group: int
    scale: str
    zeros: bool = False


_SCALED = {
    "FP8": _Apart("F8_E4M3", 1 + 4 / (128 * 128), 128, "F32"),  # a scale for 128 x 128
    "FP8_PERCHANNEL": _Apart("F8_E4M3", 1.0, 0, "F32"),  # scales of rows are added below
    "MXFP4": _Apart("MXFP4", 17 / 32, 32, "E8M0"),
    "INT4": _Apart("I4", 0.5 + 2 / 32, 32, "BF16"),
    "RAWINT4": _Apart("I4", 0.5 + 2 / 32, 32, "BF16"),
    "GPTQ_INT4": _Apart("GPTQ4", 0.5 + 2.5 / 128, 128, "F16", True),
    "AWQ_INT4": _Apart("AWQ4", 0.5 + 2.5 / 128, 128, "F16", True),
    "NVFP4": _Apart("F4_E2M1", 0.5 + 1 / 16, 16, "F32"),  # E4M3 and a factor for all, together fp32 on a GPU
    "INT8": _Apart("I8", 1.0, 0, "F32"),
}
"""By the names that people give them."""

MIXES = ("Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q2_K_S")
"""Names of published GGUF files that are no type: what `quantize` writes under them, others' mixes differ a little."""

SMALLER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S")
"""Formats to propose when memory is short, largest first."""


def format_names() -> list[str]:
    """What `--format` takes besides "published"."""
    computed = [name for name, kind in QUANT_TYPES.items() if kind.computed]
    return [*dict.fromkeys([*computed, *MIXES, *_SCALED])]


def files(name: str) -> list[str]:
    """Which files hold weights in a format: GGUF, safetensors, or both."""
    kind = QUANT_TYPES.get(name)
    safetensors = name in _SCALED or kind is not None and kind.torch_dtype is not None
    return [*(["GGUF"] if kind is not None or name in MIXES else []), *(["safetensors"] if safetensors else [])]


def bits(name: str) -> float | None:
    """Bits per weight of a large matrix, scales included; None for a mix, where that depends on the model."""
    if (kind := QUANT_TYPES.get(name)) is not None:
        return 8 * kind.nbytes / kind.block
    return 8 * _SCALED[name].nbytes if name in _SCALED else None


@dataclass(frozen=True)
class Format:
    """`stored(name, shape, dtype)` gives a tensor's type and bytes, `layout(name, shape, dtype)` the packed form that
    its bits have on a GPU, or None; None in its place: nothing is packed there. `name` is what people call it; `source`
    the open checkpoint (`loaders.ModelWeights`) whose headers say so, if any; `same(name, other)` whether two tensors
    that the config ties are one."""

    name: str
    stored: Callable[[str, tuple[int, ...], Any], tuple[str, int]]
    layout: Callable[[str, tuple[int, ...], Any], Layout | None] | None
    source: Any = None
    same: Callable[[str, str], bool] = lambda name, other: True


def format_of(
    name: str, config: Any, model: nn.Module, weights: str | Path | None = None, form: str | None = None
) -> Format:
    """How the weights of `model` are stored: by the headers of a checkpoint, by the name of a format, or as published.

    Args:
        name: what the user called the model. Where that is a .gguf or a folder with weights, its headers count unless
            `weights` or `form` say something else.
        config: the model's, as `configs.read_config` gives it.
        model: on the meta device.
        weights: a checkpoint.
        form: a name of `format_names()`, or "published": as its config says.

    Raises:
        KTransformersError: both given, or an unknown format.
        WeightError: a checkpoint that cannot be read, or whose headers do not fit the model.
    """
    if weights is not None and form is not None:
        raise KTransformersError("--format and --weights: give one; a checkpoint's headers say how it is stored.")
    if weights is not None:
        return _by_headers(weights, model)
    text = text_config(config)
    layers, tied = text.num_hidden_layers, bool(getattr(text, "tie_word_embeddings", False))
    if form is not None and form.strip().lower() != "published":
        return named_format(form, layers, tied)
    if form is None and (own := _own_weights(name)):
        try:
            return _by_headers(own, model)
        except KTransformersError as error:
            raise type(error)(f"{error}\nWithout these weights, from the config alone: --format published.") from error
    return published_format(config)


def _by_headers(weights: str | Path, model: nn.Module) -> Format:
    source = bind(open_weights(weights), model)
    check_weights(model, source)
    return weights_format(source)


def _own_weights(name: str) -> Path | None:
    """The model that `name` is, if it is a path that has weights: a .gguf, or a folder with weights in it."""
    path = model_path(name)
    if path is None:
        return None
    if path.is_dir():
        return path if any(found for kind in ("safetensors", "gguf") for found in path.glob(f"*.{kind}")) else None
    return path if path.suffix.lower() == ".gguf" else None


def named_format(name: str, layers: int, tied: bool) -> Format:
    """The format that `--format` names, for a model of so many layers.

    Raises KTransformersError for a name that no format has.
    """
    found = next((known for known in format_names() if known.lower() == name.strip().lower()), None)
    if found is None:
        known, hint = ", ".join(format_names()), did_you_mean(name.upper(), format_names())
        raise KTransformersError(f"--format {name!r}: unknown{hint}; known: published, {known}.")
    if found in _SCALED and found not in QUANT_TYPES:
        return _format(found, lambda tensor, shape, dtype: _scaled(found, tensor, shape, dtype), found)
    mix = re.sub(r"_S$", "", found) if found.startswith("Q") else found
    return _format(found, lambda tensor, shape, dtype: _gguf(mix, tensor, shape, dtype, layers, tied))


def _format(name: str, stored: Callable[[str, tuple[int, ...], Any], tuple[str, int]], *apart: str) -> Format:
    """Where types say how weights are packed on a GPU, and of scales that lie apart the formats `apart`."""
    return Format(name, stored, lambda tensor, shape, dtype: _layout(stored(tensor, shape, dtype)[0], shape[-1], apart))


def _layout(kind: str, columns: int, apart: Iterable[str]) -> Layout | None:
    """The packed form of a type; its scales are as the one of the formats `apart` that has it says."""
    if kind in GGUF_TYPES:
        return layout_of(kind)
    known = next((_SCALED[name] for name in apart if _SCALED[name].type == kind), None)
    if known is None or kind not in SCALED_TYPES:
        return None
    return scaled_layout(kind, columns, known.group or columns, known.scale, known.zeros)


def published_format(config: Any) -> Format:
    """As the model's publisher stores it, by the config: its quantization_config, else its dtype."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        quantization = getattr(text, "quantization_config", None)
    if not isinstance(quantization, dict):
        return _format("published", lambda tensor, shape, dtype: _plain(shape, dtype))
    method = str(quantization.get("quant_method") or "").lower()
    kinds = {"mxfp4": "MXFP4", "compressed-tensors": "INT4", "gptq": "GPTQ_INT4", "awq": "AWQ_INT4", "fp8": "FP8"}
    kind = kinds.get(method)
    if kind is None:
        known = ", ".join(kinds)
        raise KTransformersError(
            f"config: the size of quant_method {method!r} is not known (known: {known}). Give --weights with the "
            "checkpoint, or --format."
        )
    skip = _skipped(quantization)
    experts = "MXFP4" if quantization.get("expert_dtype") == "fp4" else kind  # DeepSeek-V4's, in a file of FP8 else
    experts_only = kind == "MXFP4"

    def stored(tensor: str, shape: tuple[int, ...], dtype: Any) -> tuple[str, int]:
        module, routed = tensor.rpartition(".")[0], ".experts." in tensor
        if skip(module) or (experts_only and not routed):
            return _plain(shape, dtype)
        return _scaled(experts if routed else kind, tensor, shape, dtype)

    return _format(f"published ({'+'.join(dict.fromkeys((kind, experts)))})", stored, kind, experts)


def weights_format(source: Any) -> Format:
    """By the headers of an open checkpoint (`loaders.ModelWeights`)."""

    def stored(tensor: str, shape: tuple[int, ...], dtype: Any) -> tuple[str, int]:
        if not source.has(tensor):
            return _plain(shape, dtype)
        kinds = source.quant_type(tensor).split("+")
        return kinds[-1], source.nbytes(tensor)

    def layout(tensor: str, shape: tuple[int, ...], dtype: Any) -> Layout | None:
        return layout_of_infos(source.infos(tensor)) if source.has(tensor) else None

    return Format(source.path.name, stored, layout, source, cache(source.same))


def _skipped(quantization: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a quantization_config leaves a module in full precision."""
    names = [
        str(name)
        for key in ("ignore", "modules_to_not_convert")
        for name in (quantization.get(key) or [] if isinstance(quantization.get(key), list) else [])
    ]
    patterns = [re.compile(name[3:] if name.startswith("re:") else _glob(name)) for name in names]
    return lambda module: any(pattern.match(module) for pattern in patterns)


def _glob(name: str) -> str:
    return re.escape(name).replace(r"\*", ".*") + r"(\.|$)"


def _plain(shape: tuple[int, ...], dtype: Any) -> tuple[str, int]:
    size = dtype.itemsize
    return {2: "F16" if "float16" == str(dtype)[6:] else "BF16"}.get(size, "F32"), math.prod(shape) * size


def is_vector_like(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor stays in full precision whatever the format: vectors, routers, convolutions, states."""
    kept = r"(\.(gate|router|conv1d|conv|weights_proj|A_log|dt_bias)\.|e_score_correction_bias|sinks)"
    return len(shape) < 2 or bool(re.search(kept, tensor)) and ".experts." not in tensor


def _scaled(kind: str, tensor: str, shape: tuple[int, ...], dtype: Any) -> tuple[str, int]:
    """Formats of safetensors leave embeddings, the head and small tensors as they are."""
    outside = tensor.endswith(("embed_tokens.weight", "embeddings.weight")) or tensor.startswith("lm_head")
    if is_vector_like(tensor, shape) or outside or "_bias" in tensor:
        return _plain(shape, dtype)
    known = _SCALED[kind]
    extra = 0 if known.group else 4 * math.prod(shape[:-1])
    return known.type, round(math.prod(shape) * known.nbytes) + extra


def _gguf(mix: str, tensor: str, shape: tuple[int, ...], dtype: Any, layers: int, tied: bool) -> tuple[str, int]:
    """The type that `quantize` writes for a tensor under `mix`, and its bytes."""
    if is_vector_like(tensor, shape) or "_bias" in tensor:
        return "F32", 4 * math.prod(shape)
    kind = choose_type(_gguf_like(tensor), shape, mix, layers, tied)
    return kind.name, kind.packed_bytes(shape)


_STANDS_FOR = {
    r"lm_head\.weight$": "output.weight",
    r"embed_tokens\.weight$": "token_embd.weight",
    r"\.v_proj\.weight$": "attn_v.weight",
    r"\.kv_b_proj\.weight$": "attn_kv_b.weight",
    r"\.down_proj(\.weight)?$": "ffn_down.weight",
}
"""What a tensor is in the words that mixes go by."""


def _gguf_like(tensor: str) -> str:
    layer = re.search(r"\.(\d+)\.", tensor)
    name = next((known for pattern, known in _STANDS_FOR.items() if re.search(pattern, tensor)), "other.weight")
    return f"blk.{layer[1]}.{name}" if layer else name
