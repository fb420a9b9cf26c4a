"""Upstream's path of the GGUF reader and of the types in such files."""

from gguf import GGMLQuantizationType

from ktransformers.loaders import GGUFLoader
from ktransformers.upstream import gone, older_path

__all__ = ["GGMLQuantizationType", "GGUFLoader"]
__getattr__ = gone(
    __name__, {"translate_name_to_gguf": "ask the weights with the model's own names, as in gguf_loader.tensor(name)"}
)
older_path(__name__, "ktransformers.loaders, and gguf for the types")
