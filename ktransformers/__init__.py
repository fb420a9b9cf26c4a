"""KTransformers: run Hugging Face MoE models whose modules a YAML rule file places and replaces.

Importing this package starts nothing: names are resolved on first use, so `import ktransformers.env`
does not pull in torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a plain checkout `models/` and `optimize_rules/` lie beside this folder, not inside it. An installed package
# has them inside, so the line below changes nothing there.
if (_root := Path(__file__).resolve().parent.parent).joinpath("optimize_rules", "__init__.py").is_file():
    __path__.append(str(_root))

_PUBLIC = {
    "optimize_and_load": "ktransformers.optimize",
    "optimize_and_load_gguf": "ktransformers.optimize",
    "KTConfig": "ktransformers.from_pretrained",
    "plan": "ktransformers.rules",
    "load_rules": "ktransformers.rules",
    "open_weights": "ktransformers.loaders",
    "config_from_gguf": "ktransformers.gguf_files.config",
    "tokenizer_from_gguf": "ktransformers.gguf_files.tokenizer",
    "KTransformersError": "ktransformers.errors",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from ktransformers.errors import KTransformersError
    from ktransformers.from_pretrained import KTConfig
    from ktransformers.gguf_files.config import config_from_gguf
    from ktransformers.gguf_files.tokenizer import tokenizer_from_gguf
    from ktransformers.loaders import open_weights
    from ktransformers.optimize import optimize_and_load, optimize_and_load_gguf
    from ktransformers.rules.plan import load_rules, plan


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ktransformers' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
