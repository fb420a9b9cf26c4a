"""What a model takes: bytes and operations of every part, where a plan puts it, and its cache.

From the meta model, a plan (`rules.plan`) and a `Format`; no weights are read. How fast a part is, is speed.py's.
Operations count two for a multiply-add. Letters: E experts of a layer, K of them per token.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ktransformers.kernels.experts import PAIRS_AT_ONCE
from ktransformers.kernels.linear import DENSE_AT_ONCE
from ktransformers.kernels.mla_decode import group_of, row_bytes
from ktransformers.models.traits import TRAITS, is_beside_text, is_transposed, layer_of
from ktransformers.native.pages import PAGE, Pages
from ktransformers.operators.embedding import KTransformersEmbedding
from ktransformers.operators.experts import KTransformersExperts
from ktransformers.operators.gpu_attention import GpuLatents
from ktransformers.operators.gpu_pages import BACK
from ktransformers.operators.hot_experts import gpu_device, ids_of
from ktransformers.operators.inner_ops import final_name, given, is_cpu
from ktransformers.operators.linear import KTransformersLinear
from ktransformers.operators.on_gpu import layout_on_gpu
from ktransformers.operators.paged_cache import FP8
from ktransformers.planner.formats import Format
from ktransformers.quants.scaled import BLOCKS_IN_C, SCALED_IN_C
from ktransformers.rules.chain import placed_by
from ktransformers.rules.plan import Replacement

DENSE = "dense"
"""The type of a part whose weights torch holds, in the model's dtype."""


@dataclass(frozen=True)
class Part:
    """One module's weights on one device.

    Attributes:
        name, layer: the module's, and the number of its layer (None outside of layers).
        kind: "experts", "attention", "dense" (other matrices in a layer), "embedding", "head" or "rest".
        device: where it computes.
        type: as which the weights are computed: a type of the C library, of kernels/layouts.py on a GPU, or DENSE.
        held: bytes in that device's memory; `mapped` says that they are the checkpoint's own pages.
        read: bytes read for one token alone, on average.
        ops: operations for one token.
        weights: how many weights there are.
        share: of a layer's experts, which of the K choices fall on this part, 0.0 to 1.0; 1.0 for all else.
        experts, chosen: E and K; 0 for all but experts.
        each_on_gpu: bytes of one of these experts on a GPU; 0 for all but experts.
    """

    name: str
    layer: int | None
    kind: str
    device: str
    type: str
    held: int
    mapped: bool
    read: float
    ops: float
    weights: int
    share: float = 1.0
    experts: int = 0
    chosen: int = 0
    each_on_gpu: int = 0


@dataclass(frozen=True)
class Cache:
    """What a layer's cache takes for one sequence: bytes per token, bytes whatever the length, and its longest length.

    `heads`, `kv_heads` and `head_dim` say what attention does with it; 0 heads for a state that is no attention. For
    latents `head_dim` is theirs, and `expanded` a head's when they are expanded to keys. `kind`: of pages, where
    one was chosen and the layer takes it.
    """

    layer: int
    per_token: int
    constant: int = 0
    window: int | None = None
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    expanded: int = 0
    kind: str | None = None

    def tokens(self, context: int) -> int:
        """How many of `context` tokens are kept."""
        return context if self.window is None else min(context, self.window - 1)  # the newest token comes on top

    @property
    def is_latent(self) -> bool:
        """Whether all heads share one latent per token (MLA)."""
        return self.kv_heads == 1 and self.heads > 1

    def attention_ops(self, tokens: int, length: int) -> float:
        """Operations of scores and sums for `tokens` new tokens, the last of which sees `length` of them."""
        return 4.0 * self.heads * self.head_dim * tokens * max(length - (tokens - 1) / 2, 1)

    def nbytes(self, context: int, batch: int = 1, on_gpu: bool = False) -> int:
        kept = self.tokens(context)
        if on_gpu and self.window is not None:
            kept = min(context, kept + BACK)
        return batch * (self.per_token * kept + self.constant)


Hits = Mapping[int, Mapping[int, float]]
"""Layer -> {expert: share of the layer's choices}."""


def parts(
    model: nn.Module, plan: Mapping[str, Replacement], form: Format, hits: Hits | None = None
) -> list[Part]:
    """Every part of `model` that holds weights. Tied weights are counted once, unless a checkpoint's own differ.

    `hits` come from a routing profile; without it all experts are chosen alike.
    """
    stated = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {target: origin for target, origin in stated.items() if form.same(target, origin)}
    found: list[Part] = []
    for name, module in model.named_modules():
        own = {
            f"{name}.{key}": tensor
            for key, tensor in (*module.named_parameters(recurse=False), *_buffers(module))
            if f"{name}.{key}" not in tied
        }
        placed = placed_by(name, plan)
        if is_beside_text(name):
            found += [_unread(_matrix(name, module, own, placed, form))] if own else []
        elif TRAITS["experts"](module):
            found += _experts(name, module, own, placed, form, model.config, hits)
        elif own:
            found.append(_matrix(name, module, own, placed, form))
    for target, origin in tied.items():
        found += _untied(target, origin, plan, found, model, form)
    return found


def _unread(part: Part) -> Part:
    """What sees or hears: it takes memory, and text passes it by."""
    return replace(part, kind="rest", layer=None, read=0.0, ops=0.0)


def _buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    hidden = module._non_persistent_buffers_set
    return ((key, tensor) for key, tensor in module.named_buffers(recurse=False) if key not in hidden)


def _stored(own: Mapping[str, torch.Tensor], form: Format) -> tuple[str, int]:
    kinds = [form.stored(name, tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()]
    return max(kinds, key=lambda kind: kind[1])[0], sum(size for _, size in kinds)


def _dense(own: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in own.values())


def on_gpu(
    own: Mapping[str, torch.Tensor], name: str | None, kwargs: Mapping[str, Any], form: Format, transposed: bool = False
) -> tuple[str, int] | None:
    """Type and bytes of a module's tensors on a GPU where the operator `name` keeps its matrices packed, else None.

    `name`, `kwargs`: as `layout_on_gpu` takes them. `transposed`: matrices [E, K, N], which are packed as [E, N, K].
    """
    found, nbytes = [], 0
    if form.layout is None:
        return None
    for key, tensor in own.items():
        if tensor.dim() < 2 or key.endswith("_bias"):
            nbytes += tensor.numel() * tensor.element_size()
            continue
        shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]) if transposed else tuple(tensor.shape)
        stored = form.layout(key, shape, tensor.dtype)
        layout = layout_on_gpu(name, stored, shape[-1], tensor.dtype, kwargs)
        if layout is None or len(shape) > 2 and layout.order:
            return None
        found.append((layout.nbytes(shape), layout.name))
    return (max(found)[1], nbytes + sum(size for size, _ in found)) if found else None


def _matrix(
    name: str, module: nn.Module, own: Mapping[str, torch.Tensor], placed: Replacement | None, form: Format
) -> Part:
    """A module that is no experts: packed where the C library computes it, dense elsewhere."""
    device = str(placed.device) if placed else "cpu"
    type_, held, mapped = DENSE, _dense(own), False
    operator = placed.operator if placed else None
    if operator is not None and issubclass(operator, KTransformersEmbedding) and type(module) is nn.Embedding:
        stored, size = _stored(own, form)
        if is_cpu(device) and in_c(stored):
            type_, held, mapped = stored, size, True
    elif operator is not None and issubclass(operator, KTransformersLinear):
        stored, size = _stored(own, form)
        named = given(placed.kwargs.get("generate_op"))
        if not is_cpu(device):
            type_, held = on_gpu(own, named, placed.kwargs, form) or (DENSE, held)
        elif final_name(named, device) in (None, "KLinearCPUInfer") and in_c(stored):
            type_, held, mapped = stored, size, True
    weights = sum(tensor.numel() for tensor in own.values())
    kind = _kind(name, module)
    matrices = sum(tensor.numel() for tensor in own.values() if tensor.dim() > 1)
    read = held * (1 / max(1, module.num_embeddings) if isinstance(module, nn.Embedding) else 1)
    ops = 0.0 if isinstance(module, nn.Embedding) else 2.0 * matrices
    return Part(name, layer_of(name), kind, device, type_, held, mapped, read, ops, weights)


def in_c(type_: str) -> bool:
    """Whether the C library computes a type: by the tables of formats, so also where it is not built."""
    return type_ in BLOCKS_IN_C | SCALED_IN_C


def _kind(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if layer_of(name) is None:
        return "head" if isinstance(module, nn.Linear) else "rest"
    if any(word in name for word in ("attn", "attention", "linear_attn", "mixer", "mamba", "indexer")):
        return "attention"
    return "dense"


def _experts(
    name: str, module: nn.Module, own: Mapping[str, torch.Tensor], placed: Replacement | None, form: Format,
    config: Any, hits: Hits | None,
) -> list[Part]:  # fmt: skip
    """Routed experts: one part, or two where a rule puts some on a GPU."""
    count, chosen = len(module.down_proj), per_token(config)
    layer, weights, dense = layer_of(name), sum(t.numel() for t in own.values()), _dense(own)
    operator = placed.operator if placed else None
    if operator is None or not issubclass(operator, KTransformersExperts):
        device = str(placed.device) if placed else "cpu"
        read = dense * chosen / count
        return [Part(name, layer, "experts", device, DENSE, dense, False, read, 2 * weights * chosen / count, weights,
                     1.0, count, chosen)]  # fmt: skip
    kwargs = placed.kwargs
    hot = ids_of(name, module, kwargs)
    used = (hits or {}).get(layer or 0)
    share = sum(used.get(e, 0.0) for e in hot) if used else len(hot) / count
    device = str(kwargs.get("generate_device") or "cpu")
    named = given(kwargs.get("generate_op")) or "KExpertsCPU"
    on_its_gpu = on_gpu(own, None, kwargs, form, is_transposed(module)) or (DENSE, dense)
    if final_name(named, device) == "KExpertsCPU":
        stored, size = _stored(own, form)
    else:
        packed = None if is_cpu(device) else on_gpu(own, named, kwargs, form, is_transposed(module))
        stored, size = packed or (DENSE, dense)
    found = []
    for where, ids, (type_, whole), part in (
        (device, count - len(hot), (stored, size), 1.0 - share), (gpu_device(kwargs), len(hot), on_its_gpu, share)
    ):  # fmt: skip
        if ids:
            read, ops = whole * chosen / count * part, 2 * weights * chosen / count * part
            mapped = type_ != DENSE and is_cpu(where)
            found.append(Part(name, layer, "experts", str(where), type_, whole * ids // count, mapped, read, ops,
                              weights * ids // count, part, ids, chosen, on_its_gpu[1] // count))  # fmt: skip
    return found


def per_token(config: Any) -> int:
    """K: how many experts a token meets in a layer; 1 where the config does not say."""
    text = config.get_text_config(decoder=True)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), 1)


def _untied(
    target: str, origin: str, plan: Mapping[str, Replacement], found: list[Part], model: nn.Module, form: Format
) -> list[Part]:
    """A tied matrix that another device, or packed bytes, need a copy of; else its reads and operations only."""
    module, source = target.rpartition(".")[0], origin.rpartition(".")[0]
    shared = next((part for part in found if part.name == source), None)
    if shared is None or not TRAITS["linear"](model.get_submodule(module)):
        return []
    placed = placed_by(module, plan)
    device = str(placed.device) if placed else shared.device
    weight = model.get_submodule(module).weight
    type_, size = DENSE, shared.weights * weight.element_size()
    if placed and placed.operator and issubclass(placed.operator, KTransformersLinear) and not is_cpu(device):
        named = given(placed.kwargs.get("generate_op"))
        type_, size = on_gpu({origin: weight}, named, placed.kwargs, form) or (type_, size)
    held = 0 if device == shared.device and type_ == DENSE else size
    return [Part(module, None, "head", device, type_, held, False, size, 2.0 * shared.weights, 0)]


# --- cache ------------------------------------------------------------------------------------------------


def caches(model: nn.Module, kind: str | None = None, plan: Mapping[str, Replacement] | None = None) -> list[Cache]:
    """What every layer caches, in order, by the modules that make it.

    `kind`: how pages keep keys and values, None for the model's dtype; `plan` then says which layers compute on pages.
    Raises NativeError where their heads do not fill whole blocks of `kind`.
    """
    config = model.config.get_text_config(decoder=True)
    size = (getattr(model, "dtype", None) or torch.float32).itemsize
    found: dict[int, Cache] = {}
    for name, module in model.named_modules():
        layer = layer_of(name)
        if layer is None or layer in found:
            continue
        cache = _cache(layer, module, config, size)
        if cache is not None:
            kept = None if kind is None else _on_pages(name, module, plan or {}, kind)
            found[layer] = cache if kept is None else replace(cache, per_token=_row_bytes(kind, *kept), kind=kind)
    return [found[layer] for layer in sorted(found)]


def _cache(layer: int, module: nn.Module, config: Any, size: int) -> Cache | None:
    kinds = getattr(config, "layer_types", None) or []
    kind = kinds[layer] if layer < len(kinds) else ""
    if TRAITS["mla"](module):
        indexer = getattr(module, "indexer", None)
        keys = getattr(getattr(indexer, "wk", None), "out_features", 0)
        width = module.kv_a_proj_with_mqa.out_features
        heads = config.num_attention_heads
        return Cache(
            layer, (width + keys) * size, heads=heads, kv_heads=1, head_dim=width,
            expanded=module.kv_b_proj.out_features // max(1, heads),
        )  # fmt: skip
    if hasattr(module, "k_proj") and hasattr(module, "v_proj") and hasattr(module, "o_proj"):
        width = module.k_proj.out_features + module.v_proj.out_features
        window = getattr(config, "sliding_window", None) if kind in ("", "sliding_attention") else None
        if kind == "" and not getattr(config, "use_sliding_window", True):
            window = None
        head = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or 1
        heads = max(1, module.o_proj.in_features // head)
        return Cache(layer, width * size, 0, window, heads, max(1, module.k_proj.out_features // head), head)
    if hasattr(module, "conv1d") and hasattr(module, "A_log"):
        return Cache(layer, 0, _state(module, config, size))
    return None


def _on_pages(
    name: str, module: nn.Module, plan: Mapping[str, Replacement], kind: str
) -> tuple[int, int, int] | None:
    """Heads, and sizes of key and value, of what a module will keep as `kind`; None where it computes otherwise."""
    placed = plan.get(name)
    if placed is None or is_cpu(placed.device) == (kind == FP8):
        return None
    found = (recognize(module) for recognize in getattr(placed.operator, "kinds", ()))
    attending = next((each for each in found if each is not None), None)
    if attending is None or kind != FP8 and getattr(attending, "cap", 0.0):  # C has no soft caps
        return None
    if kind == FP8 and (not attending.joined or GpuLatents.refuses(attending)):
        return None
    return attending.kept


def _row_bytes(kind: str, heads: int, size: int, value_size: int) -> int:
    """Bytes of a token in a layer's pages."""
    if kind == FP8:
        return row_bytes(size, value_size, group_of(size))
    return Pages(kind, heads, size, value_size).page_bytes // PAGE


def _state(module: nn.Module, config: Any, size: int) -> int:
    """Bytes of a linear-attention or state-space layer: the convolution's last inputs and the state itself."""
    convolution = math.prod(module.conv1d.weight.shape) * size
    names = ("num_v_heads", "head_k_dim", "head_v_dim")
    if all(hasattr(module, name) for name in names):
        return convolution + math.prod(getattr(module, name) for name in names) * 4
    inner = getattr(module, "intermediate_size", None) or module.conv1d.weight.shape[0]
    return convolution + inner * (getattr(module, "ssm_state_size", None) or 16) * 4


def work_bytes(model: nn.Module, tokens: int, dense: bool = True, experts: bool = True) -> int:
    """Bytes of activations of a prefill of `tokens` tokens, without attention's scores: an estimate from the widths.

    `dense`: hidden states of a layer and its residual, projections of attention, the widest product of a dense part,
    and the logits of the last token. `experts`: fp32 activations and results of the C library's experts.
    """
    config = model.config.get_text_config(decoder=True)
    hidden, each = config.hidden_size, 0
    if dense:
        linears = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
        inner = max((width for width in linears if width != config.vocab_size), default=hidden)
        each += 2 * (6 * hidden + 3 * inner)
    if experts:
        routed = max((m.down_proj.shape[-1] for m in model.modules() if TRAITS["experts"](m)), default=0)
        each += per_token(config) * (2 * routed + hidden) * 4
    return tokens * each + (config.vocab_size * 8 if dense else 0)


def kernel_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes that products with packed weights take on a GPU for `tokens` tokens: numbers made, and pairs of experts."""
    pairs = min(tokens * per_token(model.config), PAIRS_AT_ONCE)
    routed = max((m.down_proj.shape[-1] for m in model.modules() if TRAITS["experts"](m)), default=0)
    return 2 * DENSE_AT_ONCE + 2 * pairs * (3 * routed + model.config.get_text_config(decoder=True).hidden_size)
