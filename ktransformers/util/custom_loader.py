"""Upstream's path of what operators read weights from: one class here, whatever the format of the files."""

from ktransformers.loaders import GGUFLoader, ModelWeights
from ktransformers.upstream import gone, older_path

ModelLoader = SafeTensorLoader = ModelWeights
__all__ = ["GGUFLoader", "ModelLoader", "SafeTensorLoader"]
__getattr__ = gone(
    __name__,
    {
        "ModelLoaderFactory": "ktransformers.open_weights(path) opens a checkpoint of any format",
        "translate_name_to_gguf": "ask the weights with the model's own names, as in gguf_loader.tensor(name)",
    },
)
older_path(__name__, "ktransformers.loaders")
