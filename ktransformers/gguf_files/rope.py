"""RoPE of a lone GGUF file: its keys and its tensors as transformers' `rope_parameters`.

Scaling is told in two ways: by keys (`rope.scaling.*`: linear and YaRN), or by tensors with a number for each
frequency, which it is divided by: `rope_freqs` (Llama 3.1 and its kin) and `rope_factors_long`, `rope_factors_short`
(LongRoPE). llama.cpp applies both where a file has both; no transformers model does, so such a file is refused.
"""

import math
import re
from typing import Any

import torch

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.gguf_files.families import shortest
from ktransformers.loaders.base import WeightFiles

Metadata = Any
"""What is asked: config.Metadata, which is made by the file that imports this one."""

_STATED = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}
_TENSOR = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_(?P<length>long|short))\.weight")
_INSTEAD = "Give the folder with the model's config.json (--model_path)"


def rope_parameters(read: Metadata, head: int | None) -> dict[str, Any]:
    """The settings of a file; `head` is a head's width where only a part of it may be turned."""
    theta = read("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    turned = read("rope.dimension_count", None)
    if turned and head and turned != head:
        rope["partial_rotary_factor"] = turned / head
    by_keys, by_tensors = _scaling(read), _factors(read, theta)
    if by_keys and by_tensors:
        raise UnsupportedError(
            f"{read.files.paths[0]}: scales RoPE by keys ({by_keys['rope_type']}) and by tensors as well, which no "
            f"model of transformers does. {_INSTEAD}."
        )
    return rope | by_keys | by_tensors


def _scaling(read: Metadata) -> dict[str, Any]:
    """Scaling told by keys. A factor without a type is linear, as llama.cpp has it."""
    factor = read("rope.scaling.factor", 0.0) or read("rope.scale_linear", 0.0)
    kind = read("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind in ("none", "", "longrope"):  # the factors of longrope are in tensors
        return {}
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{read.files.paths[0]}: RoPE scaling of type {kind!r} is not read yet (linear, yarn, and factors in "
            f"tensors are). {_INSTEAD}."
        )
    stated = {name: value for key, name in _STATED.items() if (value := read(f"rope.scaling.{key}", None)) is not None}
    return {"rope_type": kind, "factor": factor or 1.0, **stated}


def _factors(read: Metadata, theta: float) -> dict[str, Any]:
    """Scaling told by tensors; nothing where they divide by 1."""
    found = frequency_factors(read.files)
    if not found:
        if read("rope.scaling.type", "none") == "longrope":
            raise WeightError(f"{read.files.paths[0]}: longrope, but no rope_factors_*.weight. Download it again.")
        return {}
    every = found.get("all")
    if every is not None and len(found) > 1:
        raise UnsupportedError(f"{read.files.paths[0]}: has rope_freqs and rope_factors. {_INSTEAD}.")
    if every is not None:
        if all(factor == 1 for factor in every):
            return {}
        return _llama3(every, theta) or _longrope(every, every, read("context_length"), 1.0)
    if found.keys() != {"long", "short"}:
        raise WeightError(f"{read.files.paths[0]}: has rope_factors_{next(iter(found))} alone. Download it again.")
    trained = read("rope.scaling.original_context_length", None) or read("context_length")
    return _longrope(found["long"], found["short"], trained, read("rope.scaling.attn_factor", 1.0))


def _longrope(long: list[float], short: list[float], trained: int, attention: float) -> dict[str, Any]:
    """transformers' words for any factors: `short` up to `trained` tokens, `long` beyond."""
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short, "factor": 1.0,
            "original_max_position_embeddings": trained, "attention_factor": attention}  # fmt: skip


def _llama3(factors: list[float], theta: float) -> dict[str, Any]:
    """The numbers of Llama 3.1's scaling that give `factors`, or nothing where none do.

    A frequency w is divided by 1 where its wavelength is short and by `factor` where it is long. Between, with
    s = (original / wavelength - low) / (high - low), it is divided by 1 / ((1 - s) / factor + s): s is a line over w.
    A line has two numbers and the formula three; low is 1 in every published model, and any other is the same formula.
    """
    most = shortest(max(factors))
    shares = [theta ** (-i / len(factors)) / math.tau for i in range(len(factors))]  # 1 / wavelength
    between = [
        (share, (1 / factor - 1 / most) / (1 - 1 / most))
        for share, factor in zip(shares, factors, strict=True)
        if 1.001 < factor < 0.999 * most
    ]
    if most <= 1 or len(between) < 2:
        return {}
    (x, s), (x2, s2) = between[0], between[-1]
    slope = (s2 - s) / (x2 - x)
    offset = s - slope * x
    if slope <= 0 or offset >= 0:
        return {}
    high, original = round(1 - 1 / offset, 3), round(-slope / offset)
    found = {"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": high,
             "original_max_position_embeddings": original}  # fmt: skip
    made = [_llama3_factor(share, most, high, original) for share in shares]
    return found if all(abs(a - b) < 1e-3 * b for a, b in zip(made, factors, strict=True)) else {}


def _llama3_factor(share: float, most: float, high: float, original: int) -> float:
    """What a frequency of wavelength 1 / `share` is divided by, where low is 1."""
    smooth = min(max((original * share - 1) / (high - 1), 0.0), 1.0)
    return 1 / ((1 - smooth) / most + smooth)


def frequency_factors(files: WeightFiles) -> dict[str, list[float]]:
    """What frequencies are divided by: for `all` lengths, or for `long` and `short` ones; nothing without tensors.

    Raises WeightError for factors that are no positive numbers and UnsupportedError where layers differ.
    """
    found: dict[str, list[float]] = {}
    for name in files.names():
        if not (tensor := _TENSOR.fullmatch(name)):
            continue
        key = tensor["length"] or "all"
        values = files.tensor(name, dtype=torch.float32).flatten().tolist()
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise WeightError(f"{files.paths[0]}: {name} has factors that are no positive numbers. Download it again.")
        if found.setdefault(key, values) != values:
            raise UnsupportedError(f"{files.paths[0]}: {name} differs from another layer's. {_INSTEAD}.")
    return found
