"""Inner operators (`generate_op`, `prefill_op` in a rule): their names, and the wrapper around them.

Which names are today's, obsolete, or need a GPU is said here once for `KTransformersLinear` and
`KTransformersExperts`; what the inner operators compute is said in linear.py and experts.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ktransformers import native
from ktransformers.errors import UnsupportedError, did_you_mean
from ktransformers.kernels import compiler
from ktransformers.loaders import WeightSource
from ktransformers.loaders.schemes import ScaledInfo
from ktransformers.operators.base_operator import BaseInjectedModule, InferenceState, warn_once

OBSOLETE_OPS = {
    "MLPCPUExperts": "KExpertsCPU",
    "MLPCUDAExperts": "KExpertsMarlin",
    "QuantizedLinearMarlin": "KLinearMarlin",
    "CPUInferOp": "KLinearCPUInfer",
}
"""Names that older rule files and tutorials use -> today's."""

_LINEAR, _EXPERTS = ("KLinearCPUInfer", "KLinearTorch"), ("KExpertsCPU", "KExpertsTorch")
STAND_INS = {
    **dict.fromkeys(("KLinearMarlin", "VLinearMarlin", "KLinearFP8", "KLinearQ8", "KLinearIPEXLLM"), _LINEAR),
    "KExpertsMarlin": _EXPERTS,
}
"""Operators for GPUs -> what takes their place on the CPU, and on a GPU that they do not compute on."""

BUILT = ("KLinearMarlin", "VLinearMarlin", "KLinearFP8", "KExpertsMarlin")
"""Those of them that are there."""


DENSE = "takes its place, with dense weights in the model's dtype: mind the memory"


def is_cpu(device: Any) -> bool:
    """Whether a device name means the CPU. A name that is none is not: whoever checks devices says so."""
    return str(device).partition(":")[0] == "cpu"


def given(name: Any) -> str | None:
    """The operator a rule names, or None; shipped rule files also write the text "None"."""
    return None if name in (None, "None") else name


def no_kernels(device: Any) -> str:
    """Why packed weights are not computed on `device`, as the end of a sentence, or ``""``. Starts no device."""
    try:
        return compiler.why_not(torch.device(device))
    except (RuntimeError, TypeError, ValueError):  # whoever checks devices says so
        return "there is no such device"


def final_name(name: str | None, device: Any) -> str | None:
    """What `name` comes to on `device`: today's name, or the stand-in of a GPU operator. Tells nobody."""
    today = OBSOLETE_OPS.get(name, name)
    if today not in STAND_INS or today in BUILT and not no_kernels(device):
        return today
    return STAND_INS[today][0 if is_cpu(device) else 1]


def resolve_op(name: str, device: Any) -> str:
    """`final_name`, with one warning per obsolete or replaced name."""
    today, final = OBSOLETE_OPS.get(name, name), final_name(name, device)
    if today != name:
        warn_once(f"operator name {name!r} is obsolete, today's is {today!r}; the rule works as it is")
    if final != today and is_cpu(device):
        warn_once(f"{today} runs on GPUs only; on {device} {final} takes its place")
    elif final != today:
        reason = no_kernels(device) if today in BUILT else "its GPU kernel is not built yet"
        warn_once(f"{today} on {device}: {reason}; {final} {DENSE}")
    return final


def op_problem(kwarg: str, name: Any, device: Any, table: Mapping[str, type]) -> str:
    """Say why a rule's `kwarg: name` cannot run on `device`, or return ``""``. Warns of nothing."""
    if given(name) is None:
        return ""
    today = final_name(name, device)
    if today not in table:
        known = dict.fromkeys((*table, *(op for op, (cpu, _) in STAND_INS.items() if cpu in table)))
        return f"{kwarg}: {name!r} unknown{did_you_mean(str(name), known)}; known: {', '.join(known)}"
    if getattr(table[today], "cpu_only", False) and not is_cpu(device):
        device_kwarg = kwarg.replace("_op", "_device")
        found = f"but {device_kwarg} is {str(device)!r}"
        return f"{kwarg}: {today} computes on the CPU, {found}; set {device_kwarg}: cpu"
    return ""


def dtype_problem(dtype: torch.dtype | None, torch_op: str) -> str:
    """Say why the C library cannot compute in a model of `dtype` (None: not known), or return ``""``."""
    if dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"the C library does not compute {name} (it does float32, bfloat16, float16); use {torch_op}"


def stored_problem(weights: WeightSource | None, names: Iterable[str], torch_op: str) -> str:
    """Say why the C library cannot compute the weights `names` as they are stored, or return ``""``."""
    infos = [info for name in names for info in weights.infos(name)]
    computed = native.SUPPORTED_TYPES | native.SCALED_TYPES
    if unknown := sorted({info.type.name for info in infos} - computed):
        known = ", ".join(sorted(computed))
        return f"the C library does not compute {', '.join(unknown)} (it does {known}); use {torch_op}"
    odd = next((info for info in infos if isinstance(info, ScaledInfo) and not _in_groups(info)), None)
    if odd is None:
        return ""
    found = f"{odd.type.name} of {odd.shape[-1]} columns with one scale for {odd.scale_cols}"
    return f"the C library does not compute {found} (columns are a multiple of 32, and so are scales'); use {torch_op}"


def _in_groups(info: ScaledInfo) -> bool:
    """Whether columns and groups of columns with one scale are as the C library wants them."""
    whole = info.scale_cols >= info.shape[-1]
    if info.type.name == "F8_E4M3":
        return whole or info.scale_cols % 32 == 0
    unit = 32 if info.zeros is not None else 16
    return info.shape[-1] % 32 == 0 and (whole or info.scale_cols % unit == 0)


@runtime_checkable
class InnerOperator(Protocol):
    """What computes inside a `StagedOperator`: constructed with (key, gguf_loader, config, orig_module, device).

    It is no child module, so that names in the state dict stay those of the original. Its weights are where it was
    constructed to be, in a form of its own.
    """

    key: str
    device: Any

    def load(self, w: Any = None, device: Any = None) -> None:
        """Read the weights from the checkpoint, or take them from `w`; `device` None is the operator's."""

    def unload(self) -> None:
        """Give the memory back."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """A linear's x [..., K] -> [..., N], or hidden [T, H], ids [T, K], weights [T, K] -> [T, H] of experts."""


class StagedOperator(BaseInjectedModule):
    """An operator around an inner one, or around two of which one is loaded at a time.

    The generate operator serves prefill too: one weight in memory. Another prefill operator, where a rule
    asks for one, is loaded in its stead by ``set_inference_mode(InferenceState.PREFILL)``.
    """

    adopts = False
    dense: type[InnerOperator]
    """What computes any weights, on any device."""

    def hold(self, generate: tuple[type[InnerOperator], Any], prefill: tuple[type[InnerOperator], Any] | None) -> None:
        """Make the inner operators, each a (class, device). With `prefill` None or equal, one serves both."""
        first = second = self._make(*generate)
        if prefill is not None and prefill != generate:
            second = self._make(*prefill)
        self.mode = InferenceState.UNLOAD
        # In a dict, so that nn.Module does not register them: state dict names stay those of the original.
        self._inner = {InferenceState.GENERATE: first, InferenceState.PREFILL: second}

    def _make(self, operator: type[InnerOperator], device: Any) -> InnerOperator:
        return operator(self.key, self.gguf_loader, self.config, self.orig_module, device)

    @property
    def active(self) -> InnerOperator:
        """The inner operator that computes now."""
        stage = InferenceState.PREFILL if self.mode is InferenceState.PREFILL else InferenceState.GENERATE
        return self._inner[stage]

    def load(self, w: Any = None, mode: InferenceState = InferenceState.GENERATE) -> None:
        """Load the inner operator of `mode`, from the checkpoint or from `w`; another is unloaded first."""
        if mode is InferenceState.UNLOAD:
            return self.unload()
        if self.active is not self._inner[mode]:
            self.active.unload()
        self.mode = mode
        self.loads += 1
        old, new = self.active, self._loaded(self.active, w)
        if new is not old:
            self._inner = {mode: new if inner is old else inner for mode, inner in self._inner.items()}

    def _loaded(self, inner: InnerOperator, w: Any = None) -> InnerOperator:
        """Load `inner`, or the dense operator in its stead where it is one of GPUs and cannot compute these weights."""
        try:
            inner.load(w)
            return inner
        except UnsupportedError as error:
            if not getattr(inner, "on_gpu", False):
                raise
            other = self._stand_in(inner)
            warn_once(f"{type(inner).__name__} on {inner.device}: {error} {type(other).__name__} {DENSE}")
        other.load(w)
        return other

    def become(self, operator: type[InnerOperator]) -> None:
        """Compute with an inner operator of another kind from now on, where this one does."""
        inner = self._make(operator, self.active.device)
        inner.load()
        self.unload()
        self._inner, self.mode = dict.fromkeys(self._inner, inner), InferenceState.GENERATE

    def _stand_in(self, inner: InnerOperator) -> InnerOperator:
        return self._make(self.dense, inner.device)

    def unload(self) -> None:
        self.loads += 1
        for inner in self._inner.values():
            inner.unload()
        self.mode = InferenceState.UNLOAD

    def set_inference_mode(self, mode: InferenceState) -> None:
        """Change to the inner operator of `mode`, reading the checkpoint again; free when one serves both."""
        loaded = self.mode is not InferenceState.UNLOAD
        if loaded and mode is not InferenceState.UNLOAD and self._inner[mode] is self.active:
            self.mode = mode
        elif mode is not self.mode:
            self.load(mode=mode)
