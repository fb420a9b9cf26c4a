"""The contract of every operator: what the framework calls, and how weights reach modules.

An operator is an ordinary `nn.Module` that takes the place of one module of a Hugging Face model. This file
knows nothing about kinds of operators, about rules, or about file formats.

To write one: subclass `BaseInjectedModule`, keep its constructor, override `forward()` and, when the operator
holds its weights in a form of its own, `load()` and `unload()`; then name the class in a rule.
"""

import enum
import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ktransformers.errors import UnsupportedError, WeightError
from ktransformers.loaders import WeightSource
from ktransformers.operators import failures

PLAIN = (bool, int, float, str, type(None))
"""Attributes of these types are settings of a module: numbers, names, switches."""


class InferenceState(enum.Enum):
    """Which of its two inner operators a `KTransformersLinear` or `KTransformersExperts` holds."""

    UNLOAD = 0
    PREFILL = 1
    GENERATE = 2


class BaseInjectedModule(nn.Module):
    """Base of all operators.

    Args:
        key: dotted name of the replaced module, such as ``model.layers.3.mlp``.
        gguf_loader: the open weights bound to the model (`ktransformers.loaders.ModelWeights`), of whatever
            format, asked with module names. The name is upstream's: users' operators are written to it.
        config: the model's `PretrainedConfig`.
        orig_module: the replaced module, normally on the meta device. A plain attribute, not a child.
        prefill_device, generate_device: where the operator computes; without the second, the first is both.

    An operator shares `_modules`, `_parameters` and `_buffers` with `orig_module`: names in the state dict
    stay as they were, a child replaced later is seen by both, and calling the original computes with what is
    loaded. A setting of the original that is changed on the operator is changed there too. A class that replaces the
    weights by something else says ``adopts = False`` and starts empty.
    """

    rule: str = ""
    """The place of the rule that put it here, such as "my.yaml:12"; for messages."""

    adopts: ClassVar[bool]  # no value here: a mixin such as KLinearBase, later in the MRO, may say False

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        generate_device: str | None = None,
        **kwargs: Any,
    ):
        nn.Module.__init__(self)  # not super(): that may be the family's class, which builds a whole module
        self.key = key
        self.gguf_loader = gguf_loader
        self.config = config
        self.prefill_device = prefill_device
        self.generate_device = prefill_device if generate_device is None else generate_device
        self.devices: Mapping[str, str] = {}  # module name -> device; set by load_weights, for the children
        self.loads = 0  # how often weights came and went
        object.__setattr__(self, "orig_module", orig_module)  # past nn.Module, which would register a child
        if orig_module is not None:
            self.training = orig_module.training
            if getattr(self, "adopts", True):
                for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
                    self.__dict__[shared] = orig_module.__dict__[shared]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A forward of a user's own says where it failed; those of this package are not slowed down."""
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and not cls.__module__.startswith("ktransformers."):
            cls.forward = failures.noting_failures(cls.forward)

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting of the family's module goes there too: recognized, or run, is what it says."""
        super().__setattr__(name, value)
        settings = vars(self.__dict__.get("orig_module") or self)
        if isinstance(value, PLAIN) and isinstance(settings.get(name, self), PLAIN):
            settings[name] = value

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        """Say why this operator cannot take the place of `orig_module`; an empty list when it can.

        Called before anything is touched. `kwargs` are the rule's, devices already mapped; `weights` is None
        when only a plan is asked for.
        """
        return []

    @property
    def device(self) -> Any:
        """Where `generate_device` is; operators compute there unless they say otherwise."""
        return self.generate_device

    @device.setter
    def device(self, device: Any) -> None:
        self.generate_device = device

    def load(self) -> None:
        """Load own parameters and buffers, and those of all children; a child operator loads itself."""
        self.loads += 1
        load_own_weights(self, self.gguf_loader, self.key, self.devices.get(self.key, self.generate_device))
        load_children(self, self.gguf_loader, self.key, self.devices)

    def unload(self) -> None:
        """Give the memory back; `load()` brings the weights in again."""
        self.loads += 1
        unload_weights(self)

    def unmade(self) -> dict[str, Any]:
        """Attributes that hold what was made of the children in place, each as before anything was made. Who puts other
        children in place for a while, such as adapters, keeps those of each: to make them anew takes milliseconds."""
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.orig_module.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Of an operator alone, which PEFT copies where it trains a module whole: the family's module. Of a model with
        operators there is no copy."""
        from ktransformers.operators.trained import dense

        if memo or self.orig_module is None:
            return self.__reduce_ex__(4)
        return dense(self.bare(), self.key, self.gguf_loader, self.device)

    def bare(self) -> nn.Module:
        """The replaced module, each parameter of which is as it is now, or on the meta device."""
        return self.orig_module

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle, torch.save(model), and copy.deepcopy of a model ask. State dicts are not concerned."""
        raise UnsupportedError(
            f"{self.key}: a model with operators cannot be copied or pickled: its weights are mapped files and "
            "handles. Build it again and call optimize_and_load."
        )


class FamilyOperator(BaseInjectedModule):
    """An operator that stays an instance of the class it replaces.

    transformers finds modules by class: to record attentions and router logits, to initialize, to nest
    models. So an instance gets a class of its own, made from the operator's and the replaced module's, and a
    copy of the replaced module's plain attributes, which the family's methods read.

    Without a forward of its own it computes what the family computes, where the rule puts it. Then a subclass
    only says what it replaces (`replaces`, `fits`), and what it does not do of what its name promises (`notice`).
    """

    replaces: ClassVar[str] = "any module"
    """What `fits` accepts, in the words of an error message."""
    notice: ClassVar[str] = ""
    """Said once, when the first one is built."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this operator can take the place of `module`, told from its structure."""
        return True

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        if cls.fits(orig_module):
            return []
        return [f"{cls.__name__} replaces {cls.replaces}, found {type(orig_module).__name__}"]

    def __new__(
        cls,
        key: str = "",
        gguf_loader: WeightSource | None = None,
        config: Any = None,
        orig_module: nn.Module | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> "FamilyOperator":
        if orig_module is None or isinstance(orig_module, cls) or issubclass(cls, type(orig_module)):
            return super().__new__(cls)
        return super().__new__(_family_class(cls, type(orig_module)))

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        generate_device: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device, **kwargs)
        if self.notice:
            warn_once(self.notice)
        if orig_module is not None:
            mine = self.__dict__.keys() - {"config"}  # the module's own config may be a part of the model's
            self.__dict__.update({k: v for k, v in vars(orig_module).items() if k not in mine})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "parametrizations" in self._modules:  # torch gave this object, not the original, a class that computes them
            return type(self.orig_module).forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


@functools.cache
def _family_class(operator: type, family: type) -> type:
    # The operator's name stays: printed models show it, and transformers looks for "RotaryEmbedding" in it.
    names = {"__module__": operator.__module__, "__doc__": operator.__doc__}
    return type(operator.__name__, (operator, family), names)


# --- weights into modules -------------------------------------------------------------------------------


def load_weights(
    module: nn.Module, gguf_loader: WeightSource, prefix: str = "", devices: Mapping[str, str] | None = None
) -> None:
    """Load `module`, whose name in the model is `prefix`, and everything below it. An operator loads itself.

    `devices` maps module names to devices; a module that is not in it goes where its parent goes. Dtypes are
    those of the meta tensors. Peak memory: what is loaded, plus one tensor.
    """
    devices = devices or {}
    if callable(getattr(module, "load", None)):
        module.devices = devices
        with failures.named(type(module), "load", prefix, getattr(module, "rule", "")):
            module.load()
        return
    load_own_weights(module, gguf_loader, prefix, device_of(prefix, devices))
    load_children(module, gguf_loader, prefix, devices)


def load_children(module: nn.Module, gguf_loader: WeightSource, prefix: str, devices: Mapping[str, str]) -> None:
    """`load_weights` for each child of `module`."""
    for name, child in module.named_children():
        load_weights(child, gguf_loader, join(prefix, name), devices)


def load_own_weights(module: nn.Module, gguf_loader: WeightSource, prefix: str, device: Any) -> None:
    """Load the parameters and persistent buffers of `module` itself.

    A tensor the checkpoint does not hold stays on meta (it may be tied to one that it holds); whoever drives
    the loading looks at what is left on meta at the end.

    Raises:
        WeightError: a tensor has another shape than the module expects.
    """
    skipped = module._non_persistent_buffers_set
    for table in (module._parameters, module._buffers):
        for name, old in table.items():
            full = join(prefix, name)
            if old is None or name in skipped or not gguf_loader.has(full):
                continue
            new = gguf_loader.tensor(full, device=device, dtype=old.dtype)
            if new.shape != old.shape:
                raise WeightError(
                    f"{full}: the checkpoint holds {list(new.shape)}, the model expects {list(old.shape)}."
                )
            if table is module._parameters:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            new._is_hf_initialized = True  # so that transformers' initialize_weights() leaves it alone
            table[name] = new


def unload_weights(module: nn.Module) -> None:
    """Put the weights of `module` and of everything below it back on meta; an operator unloads itself."""
    for table in (module._parameters, module._buffers):
        for name, old in table.items():
            if old is None or name in module._non_persistent_buffers_set:
                continue
            new = torch.empty_like(old, device="meta")
            if table is module._parameters:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            table[name] = new
    for child in module.children():
        if isinstance(child, BaseInjectedModule):
            child.unload()
        else:
            unload_weights(child)


def device_of(name: str, devices: Mapping[str, str]) -> str:
    """The device of module `name`: its own entry in `devices`, or its nearest ancestor's, or the CPU."""
    while name not in devices:
        if not name:
            return "cpu"
        name = name.rpartition(".")[0]
    return devices[name]


def join(prefix: str, name: str) -> str:
    """A dotted name from its two halves; the model itself has the empty name."""
    return f"{prefix}.{name}" if prefix else name


# --- small things that several operators need -----------------------------------------------------------

_told: set[str] = set()


def warn_once(message: str, about: str = "") -> None:
    """Warn with `message`, but only once per process, or once `about` something: rules apply to many layers alike."""
    if (about or message) not in _told:
        _told.add(about or message)
        warnings.warn(message, UserWarning, stacklevel=3)


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place; one made under inference_mode does not say: 0."""
    return 0 if tensor.is_inference() else tensor._version


def to_device(value: Any, device: Any) -> Any:
    """Move the tensors in `value` (one, or a tuple, list or dict of them) to `device`; all else stays."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def forward_arguments(module: nn.Module) -> list[str]:
    """Names of the required positional arguments of the module's forward."""
    _, *arguments = inspect.signature(type(module).forward).parameters.values()
    return [a.name for a in arguments if a.kind is a.POSITIONAL_OR_KEYWORD and a.default is a.empty]
