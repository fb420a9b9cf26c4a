"""From a dotted name in a rule file to a class, and from a class to the kwargs a rule may give it.

A rule file may come from anywhere, so naming a class must not run arbitrary code: only the roots below are
imported, plus what the user's program has imported already, plus the modules listed in KT_RULE_MODULES. Those may lie
beside the rule file or in the current folder, which an installed program does not look in by itself.
"""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ktransformers import env
from ktransformers.errors import did_you_mean

ROOTS = ("torch", "transformers", "ktransformers")
REFUSED = {
    r"^ktransformers\.operators\.ascend\b": "Ascend NPUs are not supported; name the class for the same part that has "
    "no W8A8 in its name, such as ktransformers.operators.linear.KTransformersLinear",
    r"IPEXLLM\w*$": "Intel's IPEX-LLM is not supported; name the class without IPEXLLM, such as KMoEGate, RMSNorm or "
    "KQwen3MoeAttention",
    r"^ktransformers\.models\.modeling_smallthinker\b": "transformers has no SmallThinker model that rules could "
    "match; use a family that it has, such as qwen3_moe",
}
"""Classes of published rule files that no rule can mean here: a regular expression -> why, and what to do instead."""
RENAMED = {
    "ktransformers.models.modeling_deepseekv3.": "ktransformers.models.modeling_deepseek_v3.",
    "ktransformers.operators.layer_wise_prefill.": "ktransformers.operators.models.",
    "ktransformers.operators.attention.KDeepseekV3Attention": "ktransformers.operators.attention.KDeepseekV2Attention",
    "ktransformers.operators.attention.flashinfer": "ktransformers.operators.balance_serve_attention.flashinfer",
    "ktransformers.operators.gate.KMoEGateDeepSeekV3": "ktransformers.operators.gate.KMoEGate",
}
"""How names of older published rule files begin -> today's."""
FRAMEWORK_PARAMETERS = {"self", "key", "gguf_loader", "config", "orig_module", "args", "kwargs"}
"""Constructor parameters that the framework fills in; a rule never gives them."""


def find_class(dotted: str, folder: Path | None = None) -> tuple[type | None, str]:
    """Find the class that `dotted` names. Returns ``(class, "")``, or ``(None, what is wrong)``.

    `folder` is the rule file's: modules of KT_RULE_MODULES are looked for there and in the current one, too.
    """
    dotted = _todays_name(dotted)
    module_name, _, class_name = dotted.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in dotted.split(".")):
        return None, f"class {dotted!r}: expected a dotted path such as 'torch.nn.Linear'"
    if reason := next((reason for pattern, reason in REFUSED.items() if re.search(pattern, dotted)), ""):
        return None, f"class {dotted!r}: {reason}"
    module, problem = _find_module(module_name, folder)
    if module is None:
        return None, f"class {dotted!r}: {problem}"
    found = getattr(module, class_name, None)
    if not inspect.isclass(found) or not _instances_can_be_tested(found):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        hint = did_you_mean(class_name, classes)
        return None, f"class {dotted!r} not found: module {module_name!r} has no class {class_name!r}{hint}"
    return found, ""


def _todays_name(dotted: str) -> str:
    from ktransformers.operators.base_operator import warn_once

    for old, new in RENAMED.items():
        if dotted.startswith(old):
            today = new + dotted.removeprefix(old)
            warn_once(f"class {dotted!r} is an older name, today's is {today!r}; the rule works as it is")
            return today
    return dotted


def _instances_can_be_tested(cls: type) -> bool:
    try:
        isinstance(None, cls)
    except TypeError:  # such as typing.Any
        return False
    return True


def _find_module(name: str, folder: Path | None) -> tuple[types.ModuleType | None, str]:
    if name in sys.modules:
        return sys.modules[name], ""
    users = _is_below(name, env.rule_modules())
    if not users and not _is_below(name, ROOTS):
        listed = ",".join([*env.rule_modules(), name.split(".")[0]])
        absent = env.rule_modules_problem(folder)
        return None, (
            f"module {name!r} is outside {', '.join(ROOTS)}, and rules do not import arbitrary code. "
            + (absent or f"Import it in your program first, or set KT_RULE_MODULES={listed}")
        )
    folders = dict.fromkeys(str(path.resolve()) for path in (folder, Path.cwd()) if path is not None) if users else ()
    try:
        with _also_looking_in(folders):
            return importlib.import_module(name), ""
    except ImportError as error:
        missing = getattr(error, "name", None) == name
        looked = f" (looked in {', '.join(folders)} too)" if missing and users else ""
        step = ". Install it, or correct its name here and in KT_RULE_MODULES" if looked else ""
        hint = _module_hint(name) if missing else ""
        return None, f"module {name!r} cannot be imported: {error}{looked}{hint}{step}"


def _is_below(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


@contextlib.contextmanager
def _also_looking_in(folders: Iterable[str]) -> Iterator[None]:
    """Inside, imports that are found nowhere else are looked for in `folders`."""
    added = [folder for folder in folders if folder not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _module_hint(name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules and hasattr(sys.modules[parent], "__path__"):
        return did_you_mean(leaf, [info.name for info in pkgutil.iter_modules(sys.modules[parent].__path__)])
    return ""


@functools.cache
def parameters(operator: type) -> Mapping[str, Any]:
    """Every kwarg that a rule may give `operator`: name -> annotation (`inspect.Parameter.empty` when it has none).

    An ``__init__`` with ``**kwargs`` hands on what it does not name, so its base classes count too.
    """
    known: dict[str, Any] = {}
    for cls in operator.__mro__:
        if "__init__" not in vars(cls) or cls.__module__.startswith("torch.nn"):
            continue
        signature = inspect.signature(cls.__init__)
        hints = _hints(cls.__init__)
        for name, parameter in signature.parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                known.setdefault(name, hints.get(name, parameter.annotation))
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    return {name: kind for name, kind in known.items() if name not in FRAMEWORK_PARAMETERS}


def _hints(function) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # an annotation names what only its own author imported: then the type is not checked
        return {}


def device_parameters(operator: type) -> list[str]:
    """Which of generate_device and prefill_device the framework fills in when a rule gives none.

    Those that the first constructor names which names any: the operator's own, or of a class that it derives from. One
    written as the tutorial's hands its generate_device on by position, and wants no prefill_device that no rule gave.
    """
    both = ("generate_device", "prefill_device")
    for cls in operator.__mro__:
        named = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else ()
        if found := [key for key in both if key in named]:
            return found
    return []


def is_operator(cls: type) -> bool:
    """Whether the framework can build and load `cls`: the contract of operators/base_operator.py."""
    from ktransformers.operators.base_operator import BaseInjectedModule

    return issubclass(cls, BaseInjectedModule)


def kwargs_problems(operator: type, kwargs: dict[str, Any]) -> dict[str, str]:
    """Say of every kwarg that `operator` does not take, or takes with another type, what is wrong."""
    known = parameters(operator)
    problems = {}
    for name, value in kwargs.items():
        if name not in known:
            expected = ", ".join(sorted(known)) or "none"
            problems[name] = (
                f"kwarg {name!r} unknown to {operator.__name__}{did_you_mean(name, known)}; it takes: {expected}"
            )
        elif not _fits(value, known[name]):
            expected = _annotation_name(known[name])
            problems[name] = f"kwarg {name}: {value!r} is {type_name(value)}, expected {expected}"
    return problems


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value fits an annotation; what is not a plain type (or a union of such) fits anything."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(annotation))
    plain = typing.get_origin(annotation) or annotation
    if not inspect.isclass(plain):
        return True
    if plain is type(None):
        return value is None
    if isinstance(value, bool):
        return issubclass(bool, plain) and plain is not int
    if plain is float and isinstance(value, int):
        return True
    if plain not in (str, int, float, dict, list, tuple, bool) and isinstance(value, (str, dict)):
        return True  # such as torch.device or torch.dtype, which YAML can only spell
    return isinstance(value, plain)


def type_name(value: Any) -> str:
    """What a YAML value is, in the words of an error message."""
    if value is None:
        return "null"
    words = (
        (bool, "true/false"),
        (str, "text"),
        (int, "a whole number"),
        (float, "a number"),
        (dict, "a mapping"),
        (list, "a list"),
    )
    return next((word for kind, word in words if isinstance(value, kind)), type(value).__name__)


def _annotation_name(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)
