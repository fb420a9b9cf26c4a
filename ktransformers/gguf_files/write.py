"""A transformers folder to a GGUF file: `kt quantize SOURCE OUT.gguf --type Q4_K_M`.

Reads through the loaders, one tensor at a time, names and lays tensors out as llama.cpp does, and encodes
them in C (native/encode.py). Peak memory is one packed tensor and one expert in fp32. The file appears whole or not at
all.
It is not a converter for every model: the families are those of loaders/gguf_names.py.
"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktransformers.errors import (
    KTransformersError,
    NativeError,
    UnsupportedError,
    WeightError,
    did_you_mean,
    join_errors,
)
from ktransformers.gguf_files.config import add_config
from ktransformers.gguf_files.imatrix import Imatrix, read_imatrix
from ktransformers.gguf_files.tokenizer import add_tokenizer
from ktransformers.loaders import ModelWeights, bind, gguf_names, open_weights
from ktransformers.native import NOT_BUILT, available, encode
from ktransformers.paths import existing_path
from ktransformers.quants.blocks import QUANT_TYPES, QuantType

FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_0": 2, "IQ4_NL": 25,
    "IQ4_XS": 30, "Q3_K_M": 12, "Q2_K": 10,
}  # fmt: skip
"""What --type takes, largest first, and the number that `general.file_type` has for it (gguf.LlamaFileType)."""


@dataclass(frozen=True)
class Output:
    """One tensor to write. `parts` yields its float pieces along the first dimension, in order."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    parts: Callable[[], Iterator[Tensor]]


# --- what to write ----------------------------------------------------------------------------------------


_IN_FULL = re.compile(r"\.(ffn_gate_inp|ssm_a$|ssm_d$|ssm_conv1d|shortconv\.conv\.|\w+_norm\.)")


_VALUE, _DOWN, _OUTPUT = r"(attn_v|attn_v_b|attn_kv_b)", r"ffn_down\w*", r"attn_output"

_RAISED: dict[str, list[tuple[str, Callable[[int, int], bool], str]]] = {
    "Q5_K_M": [(f"({_VALUE}|{_DOWN})", lambda i, n: _more_bits(i, n), "Q6_K")],
    "Q4_K_M": [(f"({_VALUE}|{_DOWN})", lambda i, n: _more_bits(i, n), "Q6_K")],
    "IQ4_NL": [(_VALUE, lambda i, n: True, "Q5_K"), (_DOWN, lambda i, n: i < n // 8, "Q5_K")],
    "IQ4_XS": [(_VALUE, lambda i, n: True, "Q5_K"), (_DOWN, lambda i, n: i < n // 8, "Q5_K")],
    "Q3_K_M": [
        (_VALUE, lambda i, n: i < 2, "Q5_K"), (_VALUE, lambda i, n: True, "Q4_K"),
        (_DOWN, lambda i, n: i < n // 16, "Q5_K"), (_DOWN, lambda i, n: _more_bits(i, n), "Q4_K"),
        (_OUTPUT, lambda i, n: True, "Q4_K"),
    ],
    "Q2_K": [(_VALUE, lambda i, n: True, "Q4_K"), (f"({_DOWN}|{_OUTPUT})", lambda i, n: True, "Q3_K")],
}  # fmt: skip
"""Of each mix: matrices, of which of n layers i, and what they get; the first that fits."""

_OUTPUT_Q6_K = {"Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K"}


def choose_type(name: str, shape: tuple[int, ...], mix: str, layers: int, tied: bool) -> QuantType:
    """The type of the GGUF tensor `name` under `mix`; mixes follow what published files of that name hold.

    Vectors, routers and what belongs to a state space or a short convolution stay F32. Below Q6_K the output matrix
    gets Q6_K, and value and down projections of some or all layers get more bits than the rest. Rows that are no
    multiple of 256 fall back to IQ4_NL where it has at least as many bits, or Q8_0, of 32 to F16.
    """
    if len(shape) == 1 or _IN_FULL.search(name):
        return QUANT_TYPES["F32"]
    kind = QUANT_TYPES[mix.removesuffix("_M")]
    if mix in _OUTPUT_Q6_K and (name == "output.weight" or (tied and name == "token_embd.weight")):
        kind = QUANT_TYPES["Q6_K"]
    if found := re.match(r"blk\.(\d+)\.(\w+)\.weight", name):
        for parts, where, raised in _RAISED.get(mix, []):
            if re.fullmatch(parts, found[2]) and where(int(found[1]), layers):
                kind = QUANT_TYPES[raised]
                break
    small = ["IQ4_NL"] if kind.name in ("Q2_K", "Q3_K", "IQ4_XS") else []
    for fallback in (kind, *(QUANT_TYPES[other] for other in (*small, "Q8_0"))):
        if shape[-1] % fallback.block == 0:
            return fallback
    return QUANT_TYPES["F16"]


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def plan(
    weights: ModelWeights, config, shapes: dict[str, tuple[int, ...]], mix: str, tied: Collection[str] = ()
) -> list[Output]:
    """Every tensor to write, in the order of the model, named and shaped as the family's files have them.

    `tied`: tensors that equal the one they are tied to. They are left out: readers take token_embd for the head.
    """
    family = next(f for f in gguf_names.FAMILIES.values() if config.model_type in f.model_types)
    outputs = []
    for name, shape in shapes.items():
        if name in tied:
            continue
        for stored, out_shape, parts in stored_pieces(weights, family, config, name, shape):
            kind = choose_type(stored, out_shape, mix, config.num_hidden_layers, "lm_head.weight" in tied)
            outputs.append(Output(stored, out_shape, kind, parts))
    return outputs


def stored_pieces(weights: ModelWeights, family, config, name: str, shape: tuple[int, ...]):
    """The GGUF tensors that one tensor of the model becomes: (name, shape, parts) each."""
    expert = gguf_names.expert(name)
    if expert and not expert["bias"]:
        yield from _expert_pieces(weights, family, name, expert["layer"], expert["which"], shape)
        return
    stored = gguf_names.gguf_name(family, config.num_hidden_layers, name)
    if stored is None:
        raise UnsupportedError(f"{name}: GGUF has no name for this tensor in architecture {family.arch}.")
    how = gguf_names.layout(family, stored)
    if how is None:
        out_shape = _as_llama_cpp_has_it(name, shape)
        yield stored, out_shape, lambda: iter([weights.tensor(name).view(out_shape)])
        return
    shapes = [size if how.parts else _as_llama_cpp_has_it(name, size) for size in how.shapes(shape, config)]
    for part, (part_name, out_shape) in enumerate(zip(gguf_names.part_names(stored, how), shapes, strict=True)):

        def parts(part: int = part, size: tuple[int, ...] = out_shape) -> Iterator[Tensor]:
            tensor = weights.tensor(name, dtype=None if how.exact else torch.float32)
            yield how.store(tensor, config)[part].reshape(size)

        yield part_name, out_shape, parts


def _as_llama_cpp_has_it(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the dimensions of size one of gates and convolutions."""
    if name.endswith("shared_expert_gate.weight") or "e_score_correction_bias" in name:
        return shape[-1:]
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 and ".conv" in name else shape


def _expert_pieces(weights: ModelWeights, family, name: str, layer: str, which: str, shape: tuple[int, ...]):
    count, rows, columns = (shape[0], shape[2], shape[1]) if family.columns else shape
    prefix = name.rpartition(".")[0]
    kinds = ("gate", "up") if which == "gate_up" else (which,)
    for number, kind in enumerate(kinds):

        def parts(number: int = number, kind: str = kind) -> Iterator[Tensor]:
            if not weights.experts_problem(prefix):
                for matrix in getattr(weights.experts(prefix), kind):
                    yield matrix.dequantize(_floats(matrix)).unsqueeze(0)
                return
            for matrix in weights.tensor(name):  # [columns, rows]: there are no rows to use as they are
                whole = matrix.T[number :: len(kinds)] if family.interleaved else matrix.T.chunk(len(kinds))[number]
                yield whole.contiguous().unsqueeze(0)

        yield f"blk.{layer}.ffn_{kind}_exps.weight", (count, rows // len(kinds), columns), parts


def _floats(matrix: Any) -> torch.dtype:
    """What the numbers of a stored matrix are read as: halves as they are, half of fp32's bytes."""
    stored = getattr(getattr(matrix, "type", None), "torch_dtype", None)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


# --- writing ----------------------------------------------------------------------------------------------


@contextmanager
def folder_beside(out: Path, needed: int = 0) -> Iterator[Path]:
    """A folder on the disk of `out` for `needed` bytes, gone afterwards in any case; disk errors become ours."""
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".quantize-", dir=out.parent))
    except OSError as error:
        raise WeightError(f"{out}: cannot be written ({error}). Choose another place.") from error
    try:
        if needed > (free := shutil.disk_usage(folder).free):
            raise WeightError(
                f"{out}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. "
                "Free some space or choose another place."
            )
        yield folder
    except OSError as error:
        free = shutil.disk_usage(out.parent).free
        raise WeightError(
            f"{out}: writing failed ({error}); {free / 1e9:.2f} GB are free there, nothing was left behind. "
            "Free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


Seen = Callable[[Output, Tensor, Tensor], None]
"""Called with each piece that was encoded: its output, the numbers, and the bytes that they became."""


def _packed(output: Output, importance: Tensor | None = None, seen: Seen | None = None) -> Tensor:
    """All bytes of one output, uint8 [bytes]. `importance` [matrices or 1, columns]."""
    packed = torch.empty(output.type.packed_bytes(output.shape), dtype=torch.uint8, device="cpu")
    start = matrix = 0
    for part in output.parts():
        for piece in _matrices(part, importance):
            try:
                row = None if importance is None else importance[matrix % len(importance)]
                size = output.type.packed_bytes(tuple(piece.shape))
                encode(piece, output.type, row, packed[start : start + size])
                if seen is not None:
                    seen(output, piece, packed[start : start + size])
            except WeightError as error:
                raise WeightError(f"{output.name}: {error}") from error
            start += size
            matrix += 1
    return packed


def _matrices(part: Tensor, importance: Tensor | None) -> Iterator[Tensor]:
    """The matrices of a piece where each has importances of its own, or the piece."""
    return iter(part) if importance is not None and len(importance) > 1 else iter([part])


def write_gguf(
    out: Path,
    arch: str,
    config,
    outputs: list[Output],
    mix: str,
    source: Path,
    split: int = 0,
    progress=lambda _: None,
    imatrix: Imatrix | None = None,
    seen: Seen | None = None,
) -> tuple[list[Path], list[str]]:
    """Write the planned tensors to `out`, or to OUT-0000i-of-0000n.gguf with at most `split` tensors each.

    `progress` is called with the number of weights after each tensor. Returns the files and notices: what
    of the tokenizer is not in them. Raises WeightError when the disk is full, leaving nothing behind.
    """
    import gguf

    with folder_beside(out, sum(o.type.packed_bytes(o.shape) for o in outputs)) as folder:
        writer = gguf.GGUFWriter(folder / out.name, arch, split_max_tensors=split)
        try:
            writer.add_type("model")
            writer.add_name(source.resolve().name)
            writer.add_file_type(FILE_TYPES[mix])
            writer.add_quantization_version(2)
            add_config(writer, arch, config)
            notices = add_tokenizer(writer, source, config)
            if imatrix is not None:
                writer.add_string("quantize.imatrix.file", imatrix.path.name)
                writer.add_uint32("quantize.imatrix.entries_count", len(imatrix.entries))
                notices += _without_importance(outputs, imatrix)
            _write_tensors(writer, outputs, progress, imatrix, seen)
        finally:
            writer.close()
        return publish(folder, out), notices


def publish(folder: Path, out: Path) -> list[Path]:
    """Move the finished files beside `out`: all of them, or none."""
    places = {path: out.with_name(path.name) for path in sorted(folder.iterdir())}
    try:
        for path, place in places.items():
            path.replace(place)
    except BaseException:  # Ctrl-C as well
        moved = [place for path, place in places.items() if not path.exists()]
        for place in moved if len(moved) < len(places) else []:
            place.unlink(missing_ok=True)
        raise
    return list(places.values())


def _without_importance(outputs: list[Output], imatrix: Imatrix) -> list[str]:
    """A notice that names the tensors for which an importance matrix has no entry and could have one."""
    choice = lambda output: output.type.block > 1 and output.type.name != "Q8_0"  # noqa: E731
    names = [output.name for output in outputs if choice(output) and output.name not in imatrix.entries]
    if not names:
        return []
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return [f"{imatrix.path.name} has no entry for {shown}: all their columns count alike."]


def _write_tensors(
    writer, outputs: list[Output], progress, imatrix: Imatrix | None = None, seen: Seen | None = None
) -> None:
    import gguf

    for output in outputs:
        nbytes = output.type.packed_bytes(output.shape)
        shape = (*output.shape[:-1], output.type.row_bytes(output.shape[-1]))
        kind = gguf.GGMLQuantizationType(output.type.id)
        writer.add_tensor_info(
            output.name, shape, np.dtype("uint8"), nbytes, kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for output in outputs:
        importance = None if imatrix is None else imatrix.of(output.name, output.shape)
        writer.write_tensor_data(_packed(output, importance, seen).numpy())
        progress(output)


# --- the whole ----------------------------------------------------------------------------------------------


def quantize_folder(
    source: Path, out: Path, mix: str = "Q4_K_M", split: int = 0, show: bool = False,
    imatrix: str | Path | None = None, change: Callable[[list[Output], Any], list[Output]] | None = None,
    seen: Seen | None = None,
) -> dict:  # fmt: skip
    """Convert the model in `source` to GGUF. Returns a summary: files, bytes, tensors by type, notices.

    `imatrix`: a file of llama-imatrix, so that errors count as much as the activations they meet. `change`: makes other
    outputs of those planned, given the config too.

    Raises NativeError where the C library, which encodes, is not built; WeightError or UnsupportedError, all problems
    of the checkpoint at once, before writing anything.
    """
    from transformers import AutoModelForCausalLM

    check_wishes(source, out, mix, split)
    importance = None if imatrix is None else read_imatrix(Path(imatrix))
    config = _config_of(source)
    family = _family_of(source, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_weights(source) as files:
        weights = bind(files, model)
        if problems := weights.problems(shapes):
            raise join_errors(WeightError, f"{source}: the weights do not fit the config:", problems)
        tied = {name for name, origin in model.all_tied_weights_keys.items() if weights.same(name, origin)}
        outputs = plan(weights, config, shapes, mix, tied)
        if change is not None:
            outputs = change(outputs, config)
        if importance is not None:
            importance.check({output.name: output.shape for output in outputs})
        with progress_bar(outputs, show) as advance:
            written, notices = write_gguf(
                out, family.arch, config, outputs, mix, source, split, advance, importance, seen
            )
    return {
        "files": [str(path) for path in written],
        "bytes": sum(path.stat().st_size for path in written),
        "types": dict(Counter(output.type.name for output in outputs)),
        "notices": notices,
    }


def check_wishes(source: Path, out: Path, mix: str, split: int) -> None:
    """Refuse what cannot be read or written, all of it at once, before anything is read."""
    if not available():
        raise NativeError(f"quantize: {NOT_BUILT}. It encodes in C.")
    problems: list[KTransformersError] = []
    if mix not in FILE_TYPES:
        known = ", ".join(FILE_TYPES)
        problems.append(UnsupportedError(f"Unknown --type {mix!r}{did_you_mean(mix, FILE_TYPES)}. Known: {known}."))
    if split < 0:
        problems.append(UnsupportedError(f"--split {split}: expected 0 (one file) or more tensors in a file."))
    if problem := _source_problem(source):
        problems.append(WeightError(f"{source}: {problem} Give a folder in Hugging Face form."))
    if out.suffix != ".gguf" or out.is_dir():
        problems.append(WeightError(f"{out}: expected the path of a file NAME.gguf to write."))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise join_errors(type(problems[0]), "nothing was written:", problems)


def _source_problem(source: Path) -> str:
    """Why `source` is no model folder, or ""."""
    if existing_path(source, "SOURCE", WeightError) is None:
        return "no such folder."
    if source.suffix == ".gguf" and not source.is_dir():
        return "is a GGUF file already, and those are not quantized again."
    if not source.is_dir():
        return "is a file, expected a folder with config.json and safetensors."
    return "" if (source / "config.json").is_file() else "no config.json in it."


def _config_of(source: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers and what it validates with raise many kinds
        raise WeightError(
            f"{source / 'config.json'}: cannot be used ({_reason(error)}). Download it again."
        ) from error


def _family_of(source: Path, config: Any) -> gguf_names.Family:
    for family in gguf_names.FAMILIES.values():
        if config.model_type in family.model_types:
            return family
    known = ", ".join(t for f in gguf_names.FAMILIES.values() for t in f.model_types)
    raise UnsupportedError(f"{source}: the GGUF names of {config.model_type!r} models are not known. Known: {known}.")


def _reason(error: Exception) -> str:
    """The first line of an error's text, with the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextmanager
def progress_bar(outputs: Sequence[Any], show: bool, doing: str = "quantizing") -> Iterator[Callable[[Any], None]]:
    """A progress bar by weights, or nothing; the value is called with each of `outputs` that is done."""
    if not show:
        yield lambda _: None
        return
    from rich.progress import Progress

    size = lambda output: torch.Size(output.shape).numel()  # noqa: E731
    with Progress() as bar:
        task = bar.add_task(doing, total=sum(map(size, outputs)))
        yield lambda output: bar.update(task, advance=size(output))
