"""Training of weights themselves, whole or in part, and nothing else of a model with operators."""

from collections.abc import Sequence

from torch import nn

from ktransformers.errors import SFTError, UnsupportedError, did_you_mean, join_errors
from ktransformers.models.traits import find_layers
from ktransformers.operators.base_operator import BaseInjectedModule
from ktransformers.operators.trained import untrainable
from ktransformers.sft.options import Options


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


def unfreeze_by(model: nn.Module, options: Options) -> None:
    """`unfreeze` what a training file's `finetuning_type` "full" or "freeze" names."""
    if options.finetuning_type == "full":
        return unfreeze(model)
    if (found := find_layers(model)) is None:
        raise SFTError("finetuning_type: the model has no layers of which some could be trained; say full or lora.")
    list_name, layers = found
    wanted, count = options.freeze_trainable_layers, len(layers)
    if not 0 < abs(wanted) <= count:
        expected = f"expected 1 to {count}, or below 0 to count from the first"
        raise SFTError(f"freeze_trainable_layers: found {wanted}, {expected}.")
    chosen = [f"{list_name}.{i}" for i in (range(count - wanted, count) if wanted > 0 else range(-wanted))]
    inner, extra = _split(options.freeze_trainable_modules), _split(options.freeze_extra_modules)
    if "all" not in inner:
        chosen = _of_layers(model, chosen, inner)
    unfreeze(model, [*chosen, *extra])


def _of_layers(model: nn.Module, layers: list[str], names: list[str]) -> list[str]:
    """The modules in these layers whose names end so."""
    known = [full for full, _ in model.named_modules() if any(_is_in(full, layer) for layer in layers)]
    for name in names:
        if not any(full.endswith(f".{name}") for full in known):
            near = did_you_mean(name, _last(known))
            raise SFTError(f"freeze_trainable_modules: these layers have no {name!r}{near}.")
    return [full for full in known if any(full.endswith(f".{name}") for name in names)]


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _last(names: Sequence[str]) -> list[str]:
    return sorted({full.rpartition(".")[2] for full in names} - {""})


def _chosen(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    for name in names:
        if not any(_is_in(full, name) for full in modules):
            raise SFTError(f"The model has no module {name!r}{did_you_mean(name, _last(list(modules)))}.")
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
