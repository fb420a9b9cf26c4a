"""Model families: what a family needs beyond what transformers says, and the embedded checkpoint.

`modeling_*.py` re-export transformers' classes under the names that published rule files match on. This package
holds no modelling code of its own.
"""

from importlib import resources
from pathlib import Path

DEFAULT_RULES = {
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
}
"""config.model_type -> name of the packaged rule file that the chat program uses when none is given."""

ONE_BY_ONE = frozenset({"jamba"})
"""Model types whose state-space layers, in transformers, start anew when several tokens come after others. Behind a
first piece of the prompt, their tokens are computed one by one."""


def embedded_model() -> Path:
    """Folder of the small chat model that ships with the package (config, tokenizer, safetensors, GGUF)."""
    return Path(str(resources.files("ktransformers.models") / "embedded"))
