"""Checkpoints as published, behind one interface: GGUF or safetensors, whole or in pieces.

`open_weights(path)` answers in the file's own tensor names, `bind(files, model)` in the model's module names.
"""

from pathlib import Path

from ktransformers.errors import WeightError
from ktransformers.loaders.base import TensorInfo, WeightFiles, WeightSource, describe_folder
from ktransformers.loaders.bind import bind
from ktransformers.loaders.dtypes import checkpoint_dtype, held_as_stored
from ktransformers.loaders.sources import ExpertWeights
from ktransformers.loaders.weights import ModelWeights
from ktransformers.paths import existing_path

GGUFLoader = ModelWeights
"""The name users' operators annotate `gguf_loader` with; it is whatever weight source is open."""

__all__ = [
    "ExpertWeights", "GGUFLoader", "ModelWeights", "TensorInfo", "WeightFiles", "WeightSource", "bind",
    "checkpoint_dtype", "held_as_stored", "open_weights",
]  # fmt: skip


def open_weights(path: str | Path) -> WeightFiles:
    """Open the checkpoint at `path`: a GGUF or safetensors file, any file of a split set, an index, or a
    folder (its safetensors, where it holds both formats).

    Headers are read and checked whole, no tensor data are. Raises WeightError for a damaged or incomplete
    checkpoint and UnsupportedError for a format this version does not read, each with the next step.
    """
    from ktransformers.loaders.gguf import GGUFFiles
    from ktransformers.loaders.safetensors import SafetensorsFiles

    if not isinstance(path, (str, Path)) or not str(path):
        raise WeightError(f"weights: found {path!r}, expected the path of a folder, a .safetensors or a .gguf.")
    given, path = path, existing_path(path, "weights", WeightError)
    if path is None:
        raise WeightError(f"{given}: no such file or folder. Check the path.")
    if path.is_dir():
        if any(path.glob("*.safetensors")):  # a folder with both: upstream's choice too
            return SafetensorsFiles.open(path)
        if any(path.glob("*.gguf")):
            return GGUFFiles.open(path)
        if any(path.glob("*.safetensors.index.json")):  # the files that it names are missing, which it says
            return SafetensorsFiles.open(path)
        raise WeightError(_no_weights(path))
    if not path.is_file():
        raise WeightError(f"{path}: neither a file nor a folder. Give the path of the weights.")
    if path.suffix == ".gguf":
        return GGUFFiles.open(path)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return SafetensorsFiles.open(path)
    raise WeightError(f"{path}: expected a .gguf or .safetensors file, or a folder with one.")


def _no_weights(folder: Path) -> str:
    """Why a folder has no weights, with the next step."""
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        step = "Only pickled weights are there: load them with transformers once and save_pretrained() them."
    elif nested := sorted({p.parent.relative_to(folder) for p in folder.glob("*/*.gguf")}):
        step = f"GGUF files are in subfolders ({', '.join(map(str, nested[:8]))}): give the path of one."
    else:
        step = "Download the weights into it, or give the folder that has them."
    return (
        f"{folder}: a model folder without weights (.safetensors or .gguf); {describe_folder(folder)}. {step}"
    )
