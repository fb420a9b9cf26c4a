"""From a path to a model that answers: config, tokenizer, meta model, rules, weights.

Nothing is printed: what a person should know goes through `notify`, what is going on through `on_step`.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ktransformers.configs import OR_RUN_ITS_CODE, meta_model, read_config
from ktransformers.errors import KTransformersError
from ktransformers.paths import existing_path


def _silent(text: str) -> None:
    """What `notify` and `on_step` do by default."""


def load(
    model_path: str = "",
    weights: str = "",
    rule: str = "",
    *,
    devices: Mapping[str, str] | None = None,
    cache: str = "",
    needs_template: bool = True,
    progress: bool = False,
    notify: Callable[[str], None] = _silent,
    on_step: Callable[[str], None] = _silent,
) -> tuple[Any, Any]:
    """Build the model on the meta device, replace modules and load weights; returns (model, tokenizer).

    Args:
        model_path: folder with config and tokenizer, or a .gguf; "" is what `weights` says, without it the embedded
            model.
        weights: a .gguf (the first of a split set), a .safetensors or a folder; "" is `model_path`.
        rule: a rule file, or the name of a packaged one; "" is the one of the model's family.
        devices: renames devices of the rules, such as ``{"cuda": "cpu"}``.
        cache: how keys and values are kept, "f32", "f16", "bf16", "q8_0", or latents on a GPU, "fp8"; "" is the model's
            dtype.
        needs_template: refuse a tokenizer without a chat template.
        progress: show a bar while the weights are read, where standard error is a terminal.
        notify: called once for each warning, with its text.
        on_step: called with what begins, such as "reading config and tokenizer".

    Raises:
        KTransformersError: a path, config, tokenizer, rule or checkpoint that cannot be used.
    """
    on_step("importing torch and transformers")
    import numpy  # noqa: F401  before torch, whose own import of it would swallow a Ctrl-C
    from transformers.utils import logging

    from ktransformers.models import DEFAULT_RULES
    from ktransformers.operators.paged_cache import check_kind
    from ktransformers.optimize import optimize_and_load

    logging.set_verbosity_error()
    check_kind(cache or None)
    model_path, weights = model_paths(model_path, weights)
    on_step(f"reading config and tokenizer of {model_path}")
    config, tokenizer = read_config_and_tokenizer(model_path, needs_template)
    on_step(f"building {config.model_type}")
    model = meta_model(config)
    rule = rule or DEFAULT_RULES.get(config.model_type, "Default")
    on_step(f"loading {weights} by rule {rule}")
    with _notices(notify):
        loaded = optimize_and_load(model, rule, weights, devices=devices, cache=cache or None, progress=progress)
    return loaded, tokenizer


def model_paths(model_path: str, weights: str) -> tuple[str, str]:
    """Each of the two from the other; the embedded model without either."""
    from ktransformers.models import embedded_model

    if not model_path and not weights:
        folder = embedded_model()
        return str(folder), str(next(folder.glob("*.gguf"), folder))
    return model_path or weights, weights or model_path


@contextlib.contextmanager
def _notices(notify: Callable[[str], None]) -> Iterator[None]:
    """Warnings as notices, each text once: a person wants the sentence, not where in our source it was said."""
    said: set[str] = set()

    def once(message: Any, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            notify(str(message))

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)  # all three are for who writes programs
            warnings.showwarning = once
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Config and tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def read_config_and_tokenizer(model_path: str, needs_template: bool = True) -> tuple[Any, Any]:
    """Config and tokenizer of a model folder, or of a GGUF file."""
    path = existing_path(model_path, "model") or Path(model_path)
    if path.suffix == ".gguf" and not path.is_dir():
        from ktransformers import config_from_gguf, tokenizer_from_gguf

        config, tokenizer = config_from_gguf(path), tokenizer_from_gguf(path)
        step = "or give a folder with chat_template.jinja as the model and this file as its weights"
    else:
        config, tokenizer = _read_folder(model_path, path)
        step = "or add chat_template.jinja to the folder"
    if needs_template and not getattr(tokenizer, "chat_template", None):
        raise KTransformersError(
            f"{model_path}: the tokenizer has no chat template, so messages cannot be told apart. "
            f"Use an instruction-tuned model, {step}."
        )
    return config, tokenizer


TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")
"""Files of which a model folder has at least one, where it has a tokenizer."""


def _read_folder(model_path: str, folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise KTransformersError(
            f"model {model_path}: {found}; expected a Hugging Face model folder, or a .gguf file."
        )
    config = read_config(folder)
    try:
        # False, not left out: transformers would ask on the terminal whether to run the folder's code.
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises its own kinds for damaged files, none with a common root
        if "trust_remote_code" in str(error):
            raise KTransformersError(
                f"{model_path}: transformers does not know this tokenizer, and code from a model folder is not run. "
                f"Use a release of transformers that has it, {OR_RUN_ITS_CODE}."
            ) from error
        if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
            raise KTransformersError(
                f"{model_path}: has no tokenizer, expected one of {', '.join(TOKENIZERS)}. Copy them from where the "
                "model was published."
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise KTransformersError(f"{model_path}: the tokenizer cannot be read: {' '.join(lines[:2])}") from error
