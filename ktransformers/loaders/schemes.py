"""Which tensors of a safetensors checkpoint make one weight: codes, and their scales, zeros and order.

Publishers name and shape them in a dozen ways; here each way becomes a `ScaledInfo` under the name that the weight
has in an unquantized checkpoint (`...gate_proj.weight`), so that everything after sees one tensor. Told from names,
types and shapes alone; the config's `quantization_config` is asked only where these leave a choice.

The layouts: transformers' finegrained_fp8 and mxfp4 integrations, compressed-tensors, NVIDIA's modelopt, AutoGPTQ
(v1) and GPTQModel (v2), AutoAWQ (gemm).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktransformers.errors import WeightError, is_whole
from ktransformers.loaders.base import TensorInfo
from ktransformers.quants.scaled import AWQ4, F4_E2M1, F8_E4M3, GPTQ4, GPTQ8, I4, I8, U8, ScaledType

Tensors = dict[str, TensorInfo]
Block = tuple[int, int]
Read = Callable[[str], bytes]


@dataclass(frozen=True, kw_only=True)
class ScaledInfo(TensorInfo):
    """A weight of codes and companions. `nbytes` counts all of them; `file` and `start` are the codes'.

    `factor` is a tensor with one number that multiplies the weight, or divides it; `absent_if_zero` one that may
    exist only if it is zero throughout (zero points of symmetric weights). `trivial_order`: the config says that
    columns are in the order of their groups.
    """

    codes: TensorInfo
    scales: TensorInfo
    scale_type: str
    scale_rows: int
    scale_cols: int
    zeros: TensorInfo | None = None
    zero_bias: int = 0
    order: TensorInfo | None = None
    trivial_order: bool = False
    factor: TensorInfo | None = None
    divides: bool = False
    absent_if_zero: TensorInfo | None = None


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint's configs say about its quantization, as far as tensors leave a choice."""

    method: str = ""
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool = True  # until the config says otherwise, g_idx decides
    gptq_v2: bool = False
    blocks: tuple[Block, ...] = ((128, 128),)
    packed_bits: tuple[int, ...] = ()


READ = ("fp8", "fbgemm_fp8", "mxfp4", "mxfp8", "gptq", "awq", "auto-round", "compressed-tensors", "modelopt", "quark")
"""Values of `quant_method` whose weights are stored in ways known here."""


# --- configs ---------------------------------------------------------------------------------------------------------

_CONFIGS = ("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")


def read_scheme(folder: Path) -> Scheme:
    """The scheme of the checkpoint in `folder`, from the first of the usual files that tells one.

    Raises WeightError for a file that is not JSON.
    """
    for name in _CONFIGS:
        if (found := _config(folder / name)) is not None:
            return _scheme(found)
    return Scheme()


def read_config(path: Path) -> dict | None:
    """The object in a JSON file, or None where there is no file or no object. Raises WeightError for other text."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"{path}: cannot be read as JSON ({error}). Download it again.") from error
    return content if isinstance(content, dict) else None


def _config(path: Path) -> dict | None:
    if (content := read_config(path)) is None:
        return None
    if path.name != "config.json":
        return content
    for part in (content, content.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                return part[key]
    return None


def _scheme(config: dict) -> Scheme:
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    weights = [w for w in weights if isinstance(w, dict)]
    blocks = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights)]
    found = dict.fromkeys(tuple(b) for b in blocks if isinstance(b, list) and len(b) == 2 and all(map(_size, b)))
    bits = {w.get("num_bits") for w in weights if w.get("type", "int") == "int"}
    desc_act = config.get("desc_act")
    return Scheme(
        method=str(config.get("quant_method") or config.get("quant_algo") or ""),
        bits=_size(config.get("bits")),
        group_size=_size(config.get("group_size")),
        desc_act=desc_act if isinstance(desc_act, bool) else True,
        gptq_v2=config.get("checkpoint_format") == "gptq_v2",
        blocks=(*found, (128, 128)),
        packed_bits=tuple(sorted(b for b in bits if _size(b))),
    )


def _size(value: Any) -> int | None:
    """`value` if it is a whole number from 1 on."""
    return value if is_whole(value, 1) else None


# --- putting tensors together ----------------------------------------------------------------------------------------


class _Unfit(Exception):
    """Why tensors do not make a weight: subject, found, expected."""


@dataclass
class _Found:
    """A weight whose tensors were recognized, before they are checked: `used` are the names of all of them."""

    name: str
    make: Callable[[], TensorInfo]
    used: set[str]


def combine(stored: Tensors, scheme: Scheme, read: Read) -> Tensors:
    """The checkpoint's tensors with codes and companions replaced by the weights they make, in the file's order.

    What looks like a quantized weight and does not fit together keeps its place, with `fault` set. `read` gives a
    small tensor's bytes; it is called only for a packed weight whose bits no config tells.
    """
    found = {name: weight for name, info in stored.items() if (weight := _recognize(name, info, stored, scheme, read))}
    companions = {used for codes, weight in found.items() for used in weight.used if used != codes}
    twice = {weight.name for codes, weight in found.items() if weight.name != codes and weight.name in stored}
    tensors: Tensors = {}
    for name, info in stored.items():
        if name in companions or name in twice:
            continue
        made = _made(found[name], info) if name in found else info
        if made.name in twice:
            made = _faulty(info, made.name, f"{made.name} and {name} are both in the checkpoint, expected one of them")
        elif name not in found and info.type.name == "F8_E4M3":
            made = _faulty(info, name, f"F8_E4M3 without scales, expected {' or '.join(_scale_names(name)[:2])}")
        tensors[made.name] = made
    return tensors


def _made(weight: _Found, codes: TensorInfo) -> TensorInfo:
    try:
        return weight.make()
    except (_Unfit, WeightError) as error:
        return _faulty(codes, weight.name, str(error).rstrip("."))


def _faulty(info: TensorInfo, name: str, fault: str) -> TensorInfo:
    return TensorInfo(name, info.shape, info.type, info.nbytes, info.file, info.start, fault)


def _recognize(name: str, info: TensorInfo, stored: Tensors, scheme: Scheme, read: Read) -> _Found | None:
    """The weight whose codes `name` holds, or None for any other tensor. The first of `_WAYS` that fits is it."""
    if info.type.name not in ("F8_E4M3", "I8", "U8", "F4", "I32"):
        return None
    way = next((way for way in _WAYS if way.fits(name, info, stored)), None)
    if way is None:
        return None
    weight, prefix, names = way.named(name, stored)
    return _found(weight, name, stored, names, prefix, lambda parts: way.make(weight, info, parts, scheme, read))


def _scale_names(weight: str) -> list[str]:
    """Where the scales of codes named `weight` may be."""
    names = [f"{weight}_scale_inv", f"{weight}_scale"]
    if weight.endswith(".weight"):
        base = weight.removesuffix("weight")
        names += [f"{base}scale", f"{base}qscale_weight"]
    return names


_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "output_scale",
                   "input_scale_ub", "qscale_act", "pre_quant_scale")  # fmt: skip
"""Companions that say how to round activations. The C library rounds them its own way, so they are not used; but the
last multiplies them, so a weight next to it is refused."""

IGNORED = r"\.([kvq]_|kv_|prob_output_)(scale|zero_point|global_scale)$"
"""Scales for quantized attention and its cache, which belong to no weight."""


def _found(
    weight: str, codes: str, stored: Tensors, names: dict[str, str], prefix: str, make: Callable[[Tensors], TensorInfo]
) -> _Found:
    """Collect those companions of `names` that are there, and those for activations, named `prefix` and a word."""
    parts = {key: stored[name] for key, name in names.items() if name in stored}
    used = {codes, *(part.name for part in parts.values())}
    used |= {f"{prefix}{word}" for word in _OF_ACTIVATIONS if f"{prefix}{word}" in stored}

    def checked() -> TensorInfo:
        if (scaled := f"{prefix}pre_quant_scale") in stored:
            raise _Unfit(f"{scaled} scales activations, which is not computed; expected a checkpoint without")
        return make(parts)

    return _Found(weight, checked, used)


def _need(parts: Tensors, key: str, weight: str) -> TensorInfo:
    if key not in parts:
        base = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
        have = ", ".join(p.name.rpartition(".")[2] for p in parts.values()) or "nothing"
        raise _Unfit(f"no {base}{key} in the checkpoint, found {have} with the codes")
    return parts[key]


def _same(part: TensorInfo, expected: tuple[int, ...], of: str) -> None:
    if part.shape != expected:
        raise _Unfit(f"{part.name} has shape {list(part.shape)}, expected {list(expected)} {of}")


def _stored_as(part: TensorInfo, *kinds: str) -> None:
    if part.type.name not in kinds:
        raise _Unfit(f"{part.name} is stored as {part.type.name}, expected {' or '.join(kinds)}")


_SCALE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F8_E8M0": "E8M0", "U8": "E8M0", "F8_E4M3": "E4M3"}


def _weight(
    name: str,
    kind: ScaledType,
    shape: tuple[int, ...],
    codes: TensorInfo,
    scales: TensorInfo,
    block: Block,
    **rest: Any,
) -> ScaledInfo:
    others = [rest[key] for key in ("zeros", "order", "factor") if rest.get(key) is not None]
    nbytes = sum(part.nbytes for part in (codes, scales, *others))
    return ScaledInfo(
        name, shape, kind, nbytes, codes.file, codes.start, codes=codes, scales=scales,
        scale_type=_SCALE_TYPES[scales.type.name], scale_rows=block[0], scale_cols=block[1], **rest,
    )  # fmt: skip


def _block_of(shape: tuple[int, ...], scales: TensorInfo, blocks: tuple[Block, ...]) -> Block:
    """How many rows and columns of a weight [(E,) N, K] share one of `scales`: [.., N/r, K/c], [N], or one number."""
    rows, columns = shape[-2:]
    found = scales.shape
    if len(found) == len(shape) and found[:-2] == shape[:-2] and all(found):
        grid = found[-2:]
        if grid == (rows, 1):
            return 1, columns
        for block in blocks:
            if grid == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
                return block
        if grid[0] <= rows and rows % grid[0] == 0 and grid[1] <= columns and columns % grid[1] == 0:
            return rows // grid[0], columns // grid[1]
    if len(found) == 1 and len(shape) == 2 and found[0] == rows:
        return 1, columns
    if math.prod(found) == 1 and len(shape) == 2 or len(shape) == 3 and found == (shape[0],):
        return rows, columns
    known = dict.fromkeys((*blocks, (1, columns), (rows, columns)))
    grids = [[*shape[:-2], math.ceil(rows / r), math.ceil(columns / c)] for r, c in known]
    raise _Unfit(
        f"{scales.name} has shape {list(found)}, expected one scale for each of equal blocks of {list(shape)}, such as "
        f"{' or '.join(map(str, grids))}"
    )


def _check_dims(codes: TensorInfo) -> None:
    if len(codes.shape) not in (2, 3) or not all(codes.shape):
        raise _Unfit(f"{codes.name} has shape {list(codes.shape)}, expected [N, K] or [E, N, K]")


def _group_of(columns: int, groups: int, scales: TensorInfo) -> int:
    if groups < 1 or columns % groups:
        raise _Unfit(f"{scales.name} has {groups} groups for {columns} columns, expected a number that divides them")
    return columns // groups


# --- one function per way of storing ---------------------------------------------------------------------------------


def _plain_codes(name: str, codes: TensorInfo, parts: Tensors, scheme: Scheme) -> ScaledInfo:
    """`x.weight` with a scale: FP8, MXFP8, INT8; FP4 of two codes a byte where the scales are of such a format."""
    _check_dims(codes)
    scales = parts["scale"]
    kind = codes.type.name
    _stored_as(scales, *_SCALE_TYPES)
    fp4 = kind in ("U8", "F4") or (kind == "I8" and scales.type.name in ("F8_E8M0", "U8"))
    if fp4:
        return _fp4(name, codes, scales, parts.get("factor"), divides=False)
    if "factor" in parts:
        raise _Unfit(f"{parts['factor'].name} with {kind} codes, expected none")
    if kind == "I8":
        _stored_as(scales, "F32", "F16", "BF16")
    block = _block_of(codes.shape, scales, scheme.blocks)
    rest = {"absent_if_zero": parts["zero_point"]} if "zero_point" in parts else {}
    return _weight(name, F8_E4M3 if kind == "F8_E4M3" else I8, codes.shape, codes, scales, block, **rest)


def _fp4(name: str, codes: TensorInfo, scales: TensorInfo, factor: TensorInfo | None, divides: bool) -> ScaledInfo:
    """Two codes a byte; one scale per 32 (MXFP4, powers of two) or per 16 with a factor for the whole (NVFP4)."""
    _check_dims(codes)
    two = 1 if codes.type.name == "F4" else 2
    shape = (*codes.shape[:-1], codes.shape[-1] * two)
    nv = scales.type.name == "F8_E4M3"
    if not nv:
        _stored_as(scales, "F8_E8M0", "U8", "F8_E4M3")
    group = 16 if nv else 32
    if shape[-1] % group:
        raise _Unfit(f"{codes.name} has {shape[-1]} columns, expected a multiple of {group}")
    _same(scales, (*shape[:-1], shape[-1] // group), f"for the weight {list(shape)}")
    if nv and factor is None:
        expected = f"{name.removesuffix('weight')}weight_global_scale" if divides else f"{name}_scale_2"
        raise _Unfit(f"no {expected} in the checkpoint, found {scales.name} with the codes")
    if factor is not None:
        _stored_as(factor, "F32")
        if math.prod(factor.shape) != 1 or len(shape) != 2:
            raise _Unfit(f"{factor.name} has shape {list(factor.shape)} for {list(shape)}, expected one number")
    return _weight(name, F4_E2M1, shape, codes, scales, (1, group), factor=factor, divides=divides)


def _blocks(name: str, codes: TensorInfo, scales: TensorInfo) -> ScaledInfo:
    """gpt-oss: blocks uint8 [E, N, K/32, 16] and scales uint8 [E, N, K/32]."""
    if len(codes.shape) != 4 or codes.shape[-1] != 16 or not all(codes.shape):
        raise _Unfit(f"{codes.name} has shape {list(codes.shape)}, expected [E, N, K/32, 16]")
    _stored_as(scales, "U8", "F8_E8M0")
    _same(scales, codes.shape[:-1], f"for blocks {list(codes.shape)}")
    shape = (*codes.shape[:2], codes.shape[2] * 32)
    return _weight(name, F4_E2M1, shape, codes, scales, (1, 32))


def _packed_fp4(name: str, codes: TensorInfo, parts: Tensors) -> ScaledInfo:
    """compressed-tensors nvfp4-pack-quantized and mxfp4-pack-quantized: `weight_packed` uint8 [N, K/2]."""
    _stored_as(codes, "U8")
    scales = _need(parts, "weight_scale", name)
    if "weight_zero_point" in parts:
        raise _Unfit(f"{parts['weight_zero_point'].name} with FP4 codes, expected none")
    return _fp4(name, codes, scales, parts.get("weight_global_scale"), divides=True)


def _packed_integers(name: str, codes: TensorInfo, parts: Tensors, scheme: Scheme, read: Read) -> ScaledInfo:
    """compressed-tensors pack-quantized: words of 32 bits along K, offset binary, low bits first. Codes of four bits
    are also published as bytes, which are the same."""
    _check_dims(codes)
    scales = _need(parts, "weight_scale", name)
    _stored_as(scales, "F32", "F16", "BF16")
    words, bits = codes.type.name == "I32", 4
    if words:
        bits = scheme.packed_bits[0] if len(scheme.packed_bits) == 1 else _bits_from_shape(codes, parts, read, name)
    if bits not in (4, 8):
        raise _Unfit(f"{codes.name} holds codes of {bits} bits, expected 4 or 8")
    kind = I4 if bits == 4 else U8
    shape = (*codes.shape[:-1], codes.shape[-1] * (kind.per_word if words else 2))
    block = _block_of(shape, scales, scheme.blocks)
    rest: dict[str, Any] = {}
    if zeros := parts.get("weight_zero_point"):
        if zeros.type.name == "I8":
            rest["absent_if_zero"] = zeros
        else:
            _stored_as(zeros, "I32")
            if block[0] != 1:
                raise _Unfit(f"{zeros.name} with one scale for {block[0]} rows, expected one per row or group")
            grid = (math.ceil(shape[-2] / kind.per_word), math.ceil(shape[-1] / block[1]))
            _same(zeros, (*shape[:-2], *grid), f"for the weight {list(shape)}")
            rest["zeros"] = zeros
    if order := parts.get("weight_g_idx"):
        _stored_as(order, "I32")
        _same(order, shape[-1:], "for its columns")
        rest |= {"order": order, "trivial_order": False}
    return _weight(name, kind, shape, codes, scales, block, **rest)


def _bits_from_shape(codes: TensorInfo, parts: Tensors, read: Read, name: str) -> int:
    """Bits of a code, from the number of columns that `weight_shape` stores."""
    shape = _need(parts, "weight_shape", name)
    _stored_as(shape, "I64", "I32")
    _same(shape, (len(codes.shape),), "for the weight's sizes")
    size = shape.nbytes // len(codes.shape)
    columns = int.from_bytes(read(shape.name)[-size:], "little", signed=True)
    words = codes.shape[-1]
    for bits in (4, 8):
        if words == math.ceil(columns * bits / 32):
            return bits
    raise _Unfit(f"{codes.name} has {words} words a row for {columns} columns, expected codes of 4 or 8 bits")


def _gptq_or_awq(name: str, codes: TensorInfo, parts: Tensors, scheme: Scheme) -> ScaledInfo:
    """`qweight`, `scales` and `qzeros`; which of the two it is shows in where the words are packed."""
    scales = _need(parts, "scales", name)
    _stored_as(scales, "F32", "F16", "BF16")
    for part in (codes, scales):
        if len(part.shape) != 2 or not all(part.shape):
            raise _Unfit(f"{part.name} has shape {list(part.shape)}, expected a matrix")
    groups, rows = scales.shape
    zeros = parts.get("qzeros")
    if zeros is not None:
        _stored_as(zeros, "I32")
    if codes.shape[1] == rows:
        return _gptq(name, codes, scales, zeros, parts.get("g_idx"), scheme)
    if codes.shape[1] * AWQ4.per_word != rows or zeros is None:
        if codes.shape[0] == rows:
            raise _Unfit(f"{codes.name} {list(codes.shape)} is packed as AWQ's gemv, expected gemm or GPTQ")
        raise _Unfit(
            f"{codes.name} has shape {list(codes.shape)} and {scales.name} {list(scales.shape)}"
            f"{'' if zeros else ' without qzeros'}, expected [K/8, N] (GPTQ) or [K, N/8] with qzeros (AWQ) and [K/g, N]"
        )
    if scheme.bits not in (None, 4):
        raise _Unfit(f"{codes.name}: AWQ of {scheme.bits} bits, expected 4")
    shape = (rows, codes.shape[0])
    _same(zeros, (groups, rows // AWQ4.per_word), f"for the weight {list(shape)}")
    return _weight(name, AWQ4, shape, codes, scales, (1, _group_of(shape[1], groups, scales)), zeros=zeros)


def _gptq(
    name: str, codes: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, order: TensorInfo | None, scheme: Scheme
) -> ScaledInfo:
    groups, rows = scales.shape
    bits = scheme.bits
    if zeros is not None and len(zeros.shape) == 2 and zeros.shape[1] * 32 % rows == 0:
        bits = zeros.shape[1] * 32 // rows
    if bits not in (4, 8):
        raise _Unfit(f"{codes.name} holds codes of {bits} bits, expected 4 or 8")
    kind = GPTQ4 if bits == 4 else GPTQ8
    shape = (rows, codes.shape[0] * kind.per_word)
    if zeros is not None:
        _same(zeros, (groups, rows // kind.per_word), f"for the weight {list(shape)}")
    if order is not None:
        _stored_as(order, "I32")
        _same(order, shape[1:], "for its columns")
    ordered = order is not None and scheme.desc_act
    size = scheme.group_size
    if size is None or math.ceil(shape[1] / size) != groups:
        size = math.ceil(shape[1] / groups) if ordered else _group_of(shape[1], groups, scales)
    return _weight(
        name, kind, shape, codes, scales, (1, size), zeros=zeros, zero_bias=0 if scheme.gptq_v2 or zeros is None else 1,
        order=order, trivial_order=not ordered,
    )  # fmt: skip


# --- which way it is -------------------------------------------------------------------------------------------------

_Names = tuple[str, str, dict[str, str]]


@dataclass(frozen=True)
class _Way:
    """One way of storing a weight.

    `fits` says whether a tensor (its name, itself, and all that are stored) holds such codes. `named` gives the name of
    the weight, how those of companions for activations begin, and those of the others by what `make` calls them.
    """

    fits: Callable[[str, TensorInfo, Tensors], bool]
    named: Callable[[str, Tensors], _Names]
    make: Callable[[str, TensorInfo, Tensors, Scheme, Read], ScaledInfo]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(*keys: str) -> Callable[[str, Tensors], _Names]:
    """Companions beside the codes, in a module whose `weight` they make."""

    def named(codes: str, stored: Tensors) -> _Names:
        base = codes.removesuffix(_leaf(codes))
        return f"{base}weight", base, {key: f"{base}{key}" for key in keys}

    return named


def _of_blocks(codes: str, stored: Tensors) -> _Names:
    weight = codes.removesuffix("_blocks")
    return weight, f"{weight}_", {"scales": f"{weight}_scales"}


def _of_plain_codes(codes: str, stored: Tensors) -> _Names:
    scale = next(name for name in _scale_names(codes) if name in stored)
    prefix = codes.removesuffix("weight") if _leaf(codes) == "weight" else f"{codes}_"
    return codes, prefix, {"scale": scale, "factor": f"{codes}_scale_2", "zero_point": f"{codes}_zero_point"}


def _holds_integers(codes: str, info: TensorInfo, stored: Tensors) -> bool:
    """Of two ways to store `weight_packed`, whether it is that of integers: words, or bytes with scales in float."""
    scales = stored.get(f"{codes.removesuffix('weight_packed')}weight_scale")
    in_float = scales is not None and scales.type.name in ("F32", "F16", "BF16")
    return info.type.name == "I32" or info.type.name == "U8" and in_float


_PACKED = _beside("weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_shape")

_WAYS = (
    _Way(
        lambda name, codes, stored: _leaf(name) == "qweight" and codes.type.name == "I32",
        _beside("scales", "qzeros", "g_idx"),
        lambda weight, codes, parts, scheme, read: _gptq_or_awq(weight, codes, parts, scheme),
    ),
    _Way(
        lambda name, codes, stored: _leaf(name) == "weight_packed" and _holds_integers(name, codes, stored),
        _PACKED,
        _packed_integers,
    ),
    _Way(
        lambda name, codes, stored: _leaf(name) == "weight_packed",
        _PACKED,
        lambda weight, codes, parts, scheme, read: _packed_fp4(weight, codes, parts),
    ),
    _Way(
        lambda name, codes, stored: (
            name.endswith("_blocks") and codes.type.name == "U8" and f"{name.removesuffix('_blocks')}_scales" in stored
        ),
        _of_blocks,
        lambda weight, codes, parts, scheme, read: _blocks(weight, codes, parts["scales"]),
    ),
    _Way(
        lambda name, codes, stored: (
            codes.type.name != "I32" and len(codes.shape) >= 2 and any(scale in stored for scale in _scale_names(name))
        ),
        _of_plain_codes,
        lambda weight, codes, parts, scheme, read: _plain_codes(weight, codes, parts, scheme),
    ),
)
"""Every way known, the particular before the general."""


# --- what users call it ----------------------------------------------------------------------------------------------

_METHODS = {"GPTQ4": "GPTQ_INT4", "GPTQ8": "GPTQ_INT8", "AWQ4": "AWQ_INT4"}


def methods(info: TensorInfo) -> tuple[str, ...]:
    """What users call the way a weight is stored, upstream's word where it has one, the best first; else the type."""
    if not isinstance(info, ScaledInfo):
        return (info.type.name,)
    kind, block, whole_rows = info.type.name, (info.scale_rows, info.scale_cols), info.scale_cols >= info.shape[-1]
    if kind == "F8_E4M3":
        if block == (1, 32) and info.scale_type == "E8M0":
            return ("MXFP8",)
        if whole_rows and block[0] == 1:
            return ("FP8_PERCHANNEL",)
        return ("FP8_PERTENSOR" if whole_rows and block[0] >= info.shape[-2] and block != (128, 128) else "FP8",)
    if kind == "F4_E2M1":
        return ("NVFP4" if info.scale_type == "E4M3" else "MXFP4",)
    if kind in ("I4", "I8", "U8"):
        bits = 4 if kind == "I4" else 8
        return (f"AMXINT{bits}", f"RAWINT{bits}") if whole_rows else (f"RAWINT{bits}",)  # a row may be one group
    return (_METHODS[kind],)
