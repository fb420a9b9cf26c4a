"""From a replacement in a plan to the operator: what a rule says becomes arguments of a constructor."""

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from ktransformers.errors import RuleError
from ktransformers.operators import failures
from ktransformers.rules.plan import Replacement

if TYPE_CHECKING:
    from ktransformers.loaders import WeightSource


def build(replacement: Replacement, source: "WeightSource", config: Any, original: nn.Module) -> nn.Module:
    """The operator that takes the place of `original`.

    Raises:
        RuleError: kwargs that do not fit the constructor, or an exception inside it; both name module and rule.
    """
    operator, key = replacement.operator, replacement.key
    where = replacement.rule.where if replacement.rule else "the plan"  # which adds operators of its own
    arguments = (key, source, config, original)
    try:
        inspect.signature(operator).bind(*arguments, **replacement.kwargs)
    except TypeError as error:
        raise RuleError(
            f"{where}: {operator.__name__} for {key} was not built with kwargs {dict(replacement.kwargs)}: {error}. "
            f"Its constructor is {inspect.signature(operator)}."
        ) from error
    with failures.named(operator, "__init__", key, where):
        built = _construct(operator, arguments, dict(replacement.kwargs))
    if "_modules" not in vars(built):
        raise RuleError(
            f"{where}: {operator.__name__} for {key}: its __init__ did not call that of its base class, so it is no "
            "module. Begin it with super().__init__(key, gguf_loader, config, orig_module, ...)."
        )
    built.rule = where
    built._is_hf_initialized = True  # transformers must not initialize it again
    return built.train(original.training)


def _construct(operator: type, arguments: tuple, kwargs: dict[str, Any]) -> nn.Module:
    """Call the constructor. One written as the tutorial's hands the device it names on by position, to where the base
    class has `prefill_device`; a rule's own `prefill_device` beside it is then set afterwards."""
    try:
        return operator(*arguments, **kwargs)
    except TypeError as error:
        if "prefill_device" not in kwargs or "multiple values for argument 'prefill_device'" not in str(error):
            raise
    prefill = kwargs.pop("prefill_device")
    built = operator(*arguments, **kwargs)
    built.prefill_device = prefill
    return built
