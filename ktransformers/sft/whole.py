"""Training of weights themselves: which modules of a model with operators, and nothing else of it."""

from collections.abc import Sequence

from torch import nn

from ktransformers.errors import SFTError, UnsupportedError, did_you_mean, join_errors
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.trained import untrainable


def unfreeze(model: nn.Module, names: Sequence[str] = ()) -> None:
    """Have the modules trained that `names` name, by the end of their names and with all that is in them; without names
    all modules. Their weights become dense parameters; of everything else none is trained.

    Raises UnsupportedError that lists what is quantized, before anything is changed; SFTError for a name that is none.
    """
    chosen = _chosen(model, names)
    if problems := [problem for module in chosen.values() if (problem := untrainable(module))]:
        shown = [*problems[:6], *([f"and {len(problems) - 6} more"] if len(problems) > 6 else [])]
        raise join_errors(UnsupportedError, "Not all that is to be trained can be:", shown)
    model.requires_grad_(False)
    for module in chosen.values():
        if isinstance(module, BaseInjectedModule):
            module.requires_grad_(True)
        for parameter in [p for p in module._parameters.values() if p is not None]:
            parameter.requires_grad_(parameter.is_floating_point())
    if _tied(model) & chosen.keys():
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if not any(_is_in(full, name) for full in modules):
            known = sorted({full.rpartition(".")[2] for full in modules} - {""})
            raise SFTError(f"The model has no module {name!r}{did_you_mean(name, known)}.")
    chosen = {full: m for full, m in modules.items() if not names or any(_is_in(full, name) for name in names)}
    if _tied(model) & chosen.keys():
        chosen |= {full: modules[full] for full in _tied(model)}
    return chosen


def _is_in(full: str, name: str) -> bool:
    """Whether the module, or one that it is in, is called so."""
    return f".{name}." in f".{full}."


def _tied(model: nn.Module) -> set[str]:
    """Embedding and head, where they have one weight."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return {name for name, module in model.named_modules() if any(module is end for end in ends)}
