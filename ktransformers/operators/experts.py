"""Routed experts: the wrapper that a rule names, and its inner operators. Routing is in moe.py.

The contract is that of transformers 5: experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) gives
[T, H]. An index outside 0..E-1 is skipped (expert parallelism marks experts of other ranks so), and an expert
that a row names twice counts twice.
Families that store weights transposed or interleaved, that have biases, gate in their own way, have no gate, or
experts that pass their input on (gpt-oss, DeepSeek-V4, Nemotron-H, LongCat-Flash) are computed too; gating.py knows the
ways of gating. Some experts of a layer may be on a GPU and the others elsewhere: hot_experts.py.
Letters: T tokens, H hidden, I intermediate, E experts, K experts per token.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransformers import native
from ktransformers.errors import DeviceError, UnsupportedError, did_you_mean
from ktransformers.loaders import WeightSource
from ktransformers.machine.streams import Streams, streams_of
from ktransformers.models.traits import identity_experts, is_interleaved, is_transposed
from ktransformers.native.torch_ops import adapted_experts
from ktransformers.operators import hot_experts, trained
from ktransformers.operators.adapters import Adapters, meet_peft, parameters_of, weight_of
from ktransformers.operators.base_operator import InferenceState, load_children, warn_once
from ktransformers.operators.combining import has_hooks
from ktransformers.operators.experts_packed import KExpertsMarlin, KExpertsPacked
from ktransformers.operators.gating import apply_gate, gating_of, interleaved, uncomputed
from ktransformers.operators.host_experts import MOST_TOKENS, HostExperts
from ktransformers.operators.inner_base import KExpertsBase, sum_by_expert
from ktransformers.operators.inner_ops import (
    InnerOperator,
    StagedOperator,
    dtype_problem,
    final_name,
    given,
    no_kernels,
    op_problem,
    resolve_op,
    stored_problem,
)
from ktransformers.operators.moe import (  # noqa: F401  rule files name the blocks as operators.experts.*
    KDeepseekV2MoE,
    KDeepseekV3MoE,
    KDeepseekV3MoEV2,
    KGlm4MoeMoE,
    KMistralSparseMoEBlock,
    KMoEBlock,
    KQwen2MoeSparseMoeBlock,
    KQwen2MoeSparseMoeBlockV2,
    KQwen3MoeSparseMoeBlock,
    KQwen3MoeSparseMoeBlockV2,
    KQwen3NextSparseMoeBlockV2,
    KSmallthinkerMoeBlock,
)
from ktransformers.operators.on_gpu import GROUP_SIZE, NUM_BITS, quantizing_problems
from ktransformers.operators.watching import Numbers

BACKENDS = ("llamafile", "AMXBF16", "AMXInt8")
"""What older rule files name as `backend` of the CPU experts. All mean the C library of this package."""

METHODS = ("BF16", "FP8", "FP8_PERCHANNEL", "FP8_PERTENSOR", "MXFP8", "RAWINT4", "AMXINT4", "RAWINT8", "AMXINT8",
           "GPTQ_INT4", "GPTQ_INT8", "AWQ_INT4", "MXFP4", "NVFP4", "LLAMAFILE")  # fmt: skip
"""How experts are stored, in upstream's words where it has one (LLAMAFILE is any GGUF type). A rule may name one as
`backend` or `method`; all mean the C library, and a checkpoint that stores them otherwise is refused."""

SKIP_LORA = "_SkipLoRA"
SFT_METHODS = tuple(f"{name}_SFT{skip}" for name in ("AMXBF16", "AMXINT8", "AMXINT4") for skip in ("", SKIP_LORA))
"""Upstream's methods for training, which convert experts for AMX. Here all mean the C library on the checkpoint's own
bytes, on any CPU; with SkipLoRA the experts stay as they are and adapters are put elsewhere alone."""


class KExpertsCPU(KExpertsBase):
    """The checkpoint's own bytes, computed by the C library: no conversion, and no copy of the weights."""

    cpu_only = takes_adapters = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._experts: native.Experts | None = None
        self._packed: Any = None
        self._numbers: Numbers | None = None
        self._hosts: dict[Streams, HostExperts] = {}

    @classmethod
    def problem(cls, key: str, experts: nn.Module, weights: WeightSource | None) -> str:
        """Say why the C library cannot compute these experts, or return ``""``. `weights` may be None."""
        if not native.available():
            return f"{native.NOT_BUILT}; KExpertsTorch needs none"
        if problem := dtype_problem(experts.down_proj.dtype, "KExpertsTorch"):
            return problem
        gating = gating_of(experts)
        if problem := uncomputed(experts, gating):
            return f"the C library does not compute {problem}; use KExpertsTorch"
        if weights is None or not weights.has_experts(key):
            return ""
        if problem := weights.experts_problem(key):
            return f"{problem}; use KExpertsTorch"
        first = "gate_up_proj" if gating.has_gate else "up_proj"
        return stored_problem(weights, [f"{key}.{first}", f"{key}.down_proj"], "KExpertsTorch")

    def load(self, w: Any = None, device: Any = None) -> None:
        if self.ids is not None and not self.ids:
            return
        packed = self.gguf_loader.experts(self.key)
        self._packed = packed if self.ids is None else hot_experts.without(packed, self.ids)
        if self._packed.copied:
            stored = "experts are stored by columns, or gate and up row by row in turn"
            warn_once(f"{stored}: KExpertsCPU computes from a copy in memory, not from the file")
        self._make()
        if len(native.nodes()) > 1:  # else the first token that needs a page would place it, on whatever node that is
            self.experts.place()

    def _make(self) -> None:
        packed, gating = self._packed, gating_of(self.orig_module)
        if problem := uncomputed(self.orig_module, gating):
            found = f"the C library does not compute {problem}"
            raise UnsupportedError(f"{self.key}, as it is set now: {found}; use KExpertsTorch")
        glu = native.Glu(
            gating.activation, gating.alpha, gating.limit, packed.gate_bias, packed.up_bias, packed.down_bias
        )
        self._experts = native.Experts(packed.gate, packed.up, packed.down, glu, name=self.key)
        self._numbers = Numbers([self.orig_module])

    @property
    def experts(self) -> native.Experts | None:
        """In C, with the limits that the module has now; None where nothing is loaded."""
        if self._experts is None or torch.compiler.is_compiling():  # a tracer sees no identity of numbers
            return self._experts
        if not self._numbers.unchanged():
            self._make()
            self._hosts.clear()
        return self._experts

    def unload(self) -> None:
        self._experts = self._packed = None
        self._hosts.clear()

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        """Begin `forward`; the value gives its result. Tokens on a GPU are computed while the GPU goes on."""
        host = self._host(hidden, weights)
        if host is None:
            out = self.forward(hidden, ids, weights)
            return lambda: out
        return host.start(hidden, ids, weights).end

    def runs_beside(self, hidden: Tensor, weights: Tensor) -> bool:
        """Whether `start` waits for nothing."""
        return self._host(hidden, weights) is not None

    def _host(self, hidden: Tensor, weights: Tensor) -> HostExperts | None:
        """What computes tokens of another device without waiting for it; None where nothing does."""
        streams = streams_of(hidden.device)
        if streams is None:
            return None
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)
        is_graph = type(hidden) is not Tensor or hidden.is_meta or torch.compiler.is_compiling()
        if wanted or is_graph or not 0 < hidden.shape[0] <= MOST_TOKENS:
            return None
        if streams not in self._hosts:
            self._hosts[streams] = HostExperts(self.experts, streams)
        return self._hosts[streams]

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, adapters: Adapters | None = None) -> Tensor:
        if adapters is not None:
            given = hidden.cpu(), ids.cpu(), weights.cpu()
            return adapted_experts(*given, *adapters.flat(), self.experts.number).to(hidden.device)
        if (host := self._host(hidden, weights)) is not None:
            return host.start(hidden, ids, weights).end()
        return self.experts.forward(hidden.cpu(), ids.cpu(), weights.cpu()).to(hidden.device)


class KSFTExpertsCPU(KExpertsCPU):
    """`KExpertsCPU`, under the name of rule files for training: gradients reach hidden states and adapters."""


class KSFTRouteExpertsCPU(KExpertsCPU):
    """The same, where the router is trained too: its weights get their gradient from either."""


class KExpertsTorch(KExpertsBase):
    """Dense weights on any device, computed by torch expert by expert. Dequantized: mind the memory.

    Plain tensors in the model's dtype, not parameters: `.to()` does not drag them to another device.
    """

    takes_adapters = True
    gate_up: Tensor | None = None  # [n, 2I, H], rows as the family orders them; [n, I, H] without a gate
    down: Tensor | None = None  # [n, H, I]; n is E, or the length of `ids`
    gate_up_bias: Tensor | None = None  # [n, 2I]
    down_bias: Tensor | None = None  # [n, H]
    slots: Tensor | None = None  # [E + 1], where each expert is in these, n for one that is not; None: in order

    def load(self, w: Any = None, device: Any = None) -> None:
        device = self.device if device is None else device
        experts, key = self.orig_module, self.key
        if self.ids is not None:
            self._load_some(device)
            return
        dtype = experts.down_proj.dtype
        first = first_projection(experts)

        def read(name: str) -> Tensor:
            return self.gguf_loader.tensor(f"{key}.{name}", device=device, dtype=dtype)

        self.gate_up, self.down = read(first), read("down_proj")
        if is_transposed(experts):
            self.gate_up, self.down = self.gate_up.transpose(1, 2), self.down.transpose(1, 2)
        if getattr(experts, "has_bias", False):
            self.gate_up_bias, self.down_bias = read(f"{first}_bias"), read("down_proj_bias")

    def _load_some(self, device: Any) -> None:
        n, packed = len(self.ids), self.gguf_loader.experts(self.key)
        made = hot_experts.dense(packed, self.ids, self.orig_module, device)
        self.gate_up, self.down, self.gate_up_bias, self.down_bias = made
        self.slots = torch.full((len(self.orig_module.down_proj) + 1,), n, device="cpu")
        self.slots[list(self.ids)] = torch.arange(n, device="cpu")
        self.slots = self.slots.to(device)

    def unload(self) -> None:
        self.gate_up = self.down = self.gate_up_bias = self.down_bias = self.slots = None

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor, adapters: Adapters | None = None) -> Tensor:
        """The T*K pairs by expert, so that every expert sees its tokens as one matrix."""
        x, ids = hidden.to(self.down.device, self.down.dtype), ids.to(self.down.device)
        stacks = self._stacks()

        def compute(slot: int, rows: Tensor) -> Tensor:
            return self._expert(slot, rows, adapters, stacks)

        out = sum_by_expert(x, ids, weights.to(x.device), self.slots, len(self.down), compute)
        return out.to(hidden.device, hidden.dtype)

    def _stacks(self) -> Any:
        """What has `gate_up`, `down` and their biases, each to be asked for the one of an expert."""
        return self

    def _expert(self, e: int, x: Tensor, adapters: Adapters | None = None, stacks: Any = None) -> Tensor:
        """Rows [t, H] through expert `e`: [t, H]."""
        adapters, stacks = adapters or Adapters(), stacks or self._stacks()
        first, second = (None if bias is None else bias[e] for bias in (stacks.gate_up_bias, stacks.down_bias))
        gate_up = F.linear(x, stacks.gate_up[e], first)
        if adapters.first is not None:
            added = adapters.first.of(self.expert_of(e), x)
            gate_up = gate_up + (interleaved(added) if is_interleaved(self.orig_module) else added)
        has_gate = getattr(self.orig_module, "has_gate", True)
        y = apply_gate(self.orig_module, gate_up) if has_gate else self.orig_module.act_fn(gate_up)
        out = F.linear(y, stacks.down[e], second)
        return out if adapters.down is None else out + adapters.down.of(self.expert_of(e), y)


class KExpertsTrained(KExpertsTorch):
    """The same, with the family's parameters as weights: what experts become that are trained. No rule names it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parameters: dict[str, nn.Parameter | None] = {}

    def load(self, w: Any = None, device: Any = None) -> None:
        device = self.device if device is None else device
        self.parameters.update(trained.dense(self.orig_module, self.key, self.gguf_loader, device)._parameters)

    def unload(self) -> None:
        self.parameters.clear()

    @property
    def down(self) -> Tensor | None:
        return self.parameters.get("down_proj")

    def _stacks(self) -> trained.Stacks:
        return trained.Stacks(self.parameters, first_projection(self.orig_module), is_transposed(self.orig_module))


EXPERTS_MAP: dict[str, type[InnerOperator]] = {
    "KExpertsTorch": KExpertsTorch, "KExpertsCPU": KExpertsCPU, "KExpertsMarlin": KExpertsMarlin,
    "KSFTExpertsCPU": KSFTExpertsCPU, "KSFTRouteExpertsCPU": KSFTRouteExpertsCPU,
}  # fmt: skip
"""Names a rule may give as `generate_op` and `prefill_op`; authors may add theirs."""


class KTransformersExperts(StagedOperator):
    """Routed experts, computed by the inner operator a rule names (see `StagedOperator`).

    Their weights are neither parameters nor buffers. The result is on `out_device`, or where the input was.
    `backend` and `method` (upstream's old and new word for it) say how the weights are stored; see `METHODS`.
    `gpu_experts` names experts (see `hot_experts.expert_ids`) that are computed on `gpu_device`: packed where kernels
    run there and the checkpoint's weights have a packed form, else by torch from dense weights. That is `out_device`
    unless given, else "cuda". The inner operator computes all others. `num_bits` and `group_size` are for
    `KExpertsMarlin`, as KTransformersLinear has them for KLinearMarlin.
    """

    dense = KExpertsTorch

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        prefill_op: str | None = None,
        generate_device: str = "cpu",
        generate_op: str | None = "KExpertsCPU",
        out_device: str | None = None,
        backend: str | None = None,
        method: str | None = None,
        gpu_experts: hot_experts.GpuExperts = None,
        gpu_device: str | None = None,
        num_bits: int = NUM_BITS,
        group_size: int = GROUP_SIZE,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device)
        self.out_device, self.quantizing = out_device, (num_bits, group_size)
        self.n_experts, self.idle = len(orig_module.down_proj), identity_experts(orig_module)
        for word in (backend, method):
            if word in (*BACKENDS[1:], *SFT_METHODS):
                warn_once(f"backend {word!r}: the C library picks kernels for this CPU, and converts no weights")
        self.skips_lora = any(str(word).endswith(SKIP_LORA) for word in (backend, method))
        if getattr(orig_module, "has_post_expert_norm", False):
            self.post_expert_norm = orig_module.post_expert_norm
        self.adapters: Adapters | None = None  # set by those around a call, see adapters.py
        self.split: hot_experts.Split | None = None
        if ids := hot_experts.expert_ids(gpu_experts, hot_experts.layer_of(key), self.n_experts):
            place = hot_experts.gpu_device({"gpu_device": gpu_device, "out_device": out_device})
            packs = not no_kernels(place) and KExpertsPacked.keeps(key, orig_module, gguf_loader)
            hot = self._make(KExpertsPacked if packs else KExpertsTorch, torch.device(place))
            hot.ids = ids
            self.split = hot_experts.Split(hot, self.n_experts)
        generate = self._op(given(generate_op) or "KExpertsCPU", generate_device)
        self.hold(generate, self._op(prefill_op, prefill_device) if given(prefill_op) else None)

    @staticmethod
    def _op(name: str, device: str) -> tuple[type[InnerOperator], torch.device]:
        return EXPERTS_MAP[resolve_op(name, device)], torch.device(device)

    def _make(self, operator: type[InnerOperator], device: Any) -> InnerOperator:
        inner = super()._make(operator, device)
        if isinstance(inner, KExpertsMarlin):
            inner.quantizing = self.quantizing
        if self.split is not None:
            inner.ids = self.split.rest_ids
        return inner

    def _stand_in(self, inner: InnerOperator) -> InnerOperator:
        other = super()._stand_in(inner)
        other.ids = inner.ids
        return other

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        if problem := layout_problem(orig_module):
            return [problem]
        problems = hot_experts.problems(key, orig_module, kwargs, weights)
        all_on_gpu = not problems and len(hot_experts.ids_of(key, orig_module, kwargs)) == len(orig_module.down_proj)
        named = {
            "generate": given(kwargs.get("generate_op")) or "KExpertsCPU",
            "prefill": given(kwargs.get("prefill_op")),
        }
        fallback = {"generate": "cpu", "prefill": "cuda"}
        for stage, name in named.items():
            device = kwargs.get(f"{stage}_device") or fallback[stage]
            if problem := op_problem(f"{stage}_op", name, device, EXPERTS_MAP):
                problems.append(problem)
            elif name is not None and issubclass(EXPERTS_MAP[final_name(name, device)], KExpertsCPU) and not all_on_gpu:
                if problem := KExpertsCPU.problem(key, orig_module, weights):
                    problems.append(f"{stage}_op: {problem}")
        for word in ("backend", "method"):
            if (name := kwargs.get(word)) is not None and (problem := _method_problem(name, key, weights)):
                problems.append(f"{word}: {problem}")
        return problems + quantizing_problems(kwargs)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The contract; or Llama-4's, whose block passes [E*T, H] alone: T rows for each expert, zeros where it was
        not chosen."""
        if top_k_index is None:
            return self._by_expert(hidden_states)
        norm = getattr(self, "post_expert_norm", None)
        compute = self._sum if norm is None else self._sum_of_normed
        out = compute(hidden_states, top_k_index, top_k_weights)
        if self.idle:
            passed = (top_k_weights * (top_k_index >= self.n_experts)).sum(-1, keepdim=True).to(out.dtype)
            out = out + hidden_states.to(out.device) * passed.to(out.device)
        return out if self.out_device is None else out.to(self.out_device)

    def start(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        """Begin a call; the value gives its result. What the caller computes meanwhile runs beside it where it can."""
        plain = type(self).forward is KTransformersExperts.forward and not has_hooks(self) and self.out_device is None
        alone = plain and not self.idle and not hasattr(self, "post_expert_norm") and self.adapters is None
        if alone and self.split is not None and (end := self.split.start(self.active, hidden, ids, weights)):
            return end
        if not alone or self.split is not None or not isinstance(self.active, KExpertsCPU):
            out = self(hidden, ids, weights)
            return lambda: out
        return self.active.start(hidden, ids, weights)

    def _sum(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        adapters = () if self.adapters is None else (self.adapters,)
        if self.split is None:
            return self.active.forward(hidden, ids, weights, *adapters)
        return self.split.forward(self.active, hidden, ids, weights, self.out_device, *adapters)

    def adapter_problem(self) -> str:
        """Why no adapter is computed inside these experts, or ``""``."""
        inner = [*self._inner.values(), *([] if self.split is None else [self.split.hot])]
        unable = [type(one).__name__ for one in inner if not getattr(one, "takes_adapters", False)]
        if not unable:
            return ""
        return f"{self.key}: {unable[0]} computes no adapters; name KExpertsCPU, KExpertsTorch or KExpertsMarlin"

    def _sum_of_normed(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Of experts whose results are each normalized: every pair of token and expert is a row of its own."""
        rows, one = hidden.repeat_interleave(ids.shape[1], 0), torch.ones_like(weights[:, :1])
        each = self._sum(rows, ids.reshape(-1, 1), one.repeat_interleave(ids.shape[1], 0))
        norm = self.post_expert_norm
        each = norm(each.to(next(norm.parameters()).device))
        each = each * weights.reshape(-1, 1).to(each)
        return each.view(*ids.shape, -1).sum(1)

    def _by_expert(self, hidden: Tensor) -> Tensor:
        chosen = hidden.any(dim=1).nonzero().squeeze(1)  # an expert without biases makes zeros of zeros
        ids = chosen // (len(hidden) // self.n_experts)
        ones = torch.ones(len(ids), 1, dtype=torch.float32, device=ids.device)
        rows = self.forward(hidden[chosen], ids.unsqueeze(1), ones)
        return rows.new_zeros(hidden.shape).index_copy_(0, chosen.to(rows.device), rows)

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """True has the experts trained, which makes them parameters; see trained.py."""
        if requires_grad and not isinstance(self.active, KExpertsTrained):
            if self.split is not None:
                found = f"some experts are on {self.split.hot.device}, and are not trained there"
                raise UnsupportedError(f"{self.key}: {found}; leave gpu_experts out of the rule.")
            self.become(KExpertsTrained)
            self.__dict__["_parameters"] = self.active.parameters
        return super().requires_grad_(requires_grad)

    def named_parameters(self, prefix: str = "", recurse: bool = True, *args: Any, **kwargs: Any) -> Any:
        """None, as expert weights are no parameters until they are trained; but to one who asks for this module's own,
        as PEFT does for what can have an adapter, they are. See adapters.py."""
        yield from super().named_parameters(prefix, recurse, *args, **kwargs)
        if not recurse and "peft" in sys.modules:
            meet_peft()
            yield from parameters_of(self)

    def __getattr__(self, name: str) -> Any:
        """Called for what is not found: the family's parameters, which PEFT asks for shapes."""
        family = None if name in self.__dict__.get("_parameters", ()) else self.__dict__.get("orig_module")
        if name in ("gate_up_proj", "up_proj", "down_proj") and family is not None and name in family._parameters:
            return weight_of(self, name)
        if name == "is_transposed" and "orig_module" in self.__dict__:
            return getattr(self.orig_module, name, False)
        return super().__getattr__(name)

    @property
    def qweight(self) -> Any:
        """PEFT's word for weights that are packed: adapters go to the device that it names."""
        return weight_of(self, "down_proj")

    def load(self, w: Any = None, mode: InferenceState = InferenceState.GENERATE) -> None:
        """As for any staged operator; the GPU's part stays as it is when the inner operator changes."""
        super().load(w, mode)
        load_children(self, self.gguf_loader, self.key, self.devices)
        if self.split is None or mode is InferenceState.UNLOAD or self.split.loaded:
            return
        try:
            self.split.hot, self.split.loaded = self._loaded(self.split.hot), True
        except torch.OutOfMemoryError as error:
            n, device = len(self.split.hot.ids), self.split.hot.device
            raise DeviceError(f"{self.key}: {n} experts do not fit on {device}. Name fewer in gpu_experts.") from error

    def unload(self) -> None:
        super().unload()
        if self.split is not None:
            self.split.unload()

    def extra_repr(self) -> str:
        text = f"{type(self.active).__name__} on {self.generate_device}{getattr(self.active, 'form', '')}"
        if self.split is None:
            return text
        return f"{text}, {len(self.split.hot.ids)} of {self.n_experts} experts on {self.split.hot.device}"


class KTransformersExpertsV2(KTransformersExperts):
    """`KTransformersExperts`, under the name of server rule files."""


class KGlm4Experts(KTransformersExperts):
    """`KTransformersExperts`, under the name of GLM-4-MoE's rule files."""


class KSmallthinkerExperts(KTransformersExperts):
    """`KTransformersExperts`, under the name of SmallThinker's rule files."""


def _method_problem(name: Any, key: str, weights: WeightSource | None) -> str:
    """Say why experts are not stored as a rule's `backend` or `method` says, or return ``""``."""
    known = (*METHODS, *BACKENDS, *SFT_METHODS)
    if name not in known:
        return f"{name!r} unknown{did_you_mean(str(name), known)}; known: {', '.join(known)}"
    if name in (*BACKENDS, *SFT_METHODS) or weights is None or not weights.has_experts(key):
        return ""
    parts = [part for part in weights.names() if part.rpartition(".")[0] == key and part.endswith("_proj")]
    if all(weights.is_stored_as(part, name) for part in parts):
        return ""
    found = dict.fromkeys(method for part in parts for method in weights.methods(part))
    types = dict.fromkeys(kind for part in parts for kind in weights.quant_type(part).split("+"))
    return (
        f"{name} asks for experts stored so, found {', '.join(found)} ({', '.join(types)}); name what is there, or "
        "leave it out: the checkpoint decides"
    )


def first_projection(experts: nn.Module) -> str:
    """The name of what multiplies the input: gate and up in one, or up alone."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def layout_problem(experts: nn.Module) -> str:
    """Say why `experts` is not laid out as one that the operators here compute, or ``""``."""
    found, first = type(experts).__name__, first_projection(experts)
    gate_up, down = getattr(experts, first, None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return f"found {found}, expected an experts module with gate_up_proj [E, 2I, H], down_proj [E, H, I]"
    if odd := _oddity(experts, gate_up, down):
        refused = "which this version does not compute; leave it to transformers (class: default)"
        return f"{found} has {odd}, {refused}"
    return ""


def _oddity(experts: nn.Module, gate_up: Tensor, down: Tensor) -> str:
    """The first thing about `experts` that no inner operator computes, or ``""``."""
    if is_transposed(experts):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    wide = 2 if getattr(experts, "has_gate", True) else 1
    if len(gate_up) < len(down) or gate_up.shape[1:] != (wide * down.shape[2], down.shape[1]):
        return f"{first_projection(experts)} {list(gate_up.shape)} with down_proj {list(down.shape)}"
    return "" if hasattr(experts, "act_fn") or hasattr(experts, "_apply_gate") else "no act_fn"
