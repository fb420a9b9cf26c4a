"""Multi-head latent attention (DeepSeek-V2, V3 and kin) with `kv_b_proj` absorbed into queries and outputs.

The cache holds, per token, one latent (rank L) and one rotated key (R) for all heads, exactly as transformers' own
module fills it, so dynamic, static and quantized caches all work; attention_inputs.py refuses those that are not known.
transformers expands the whole cache to per-head keys and values in every step; here a step with few queries works on
the latents instead. Following the papers (DeepSeek-V2, section 2.1), with W_UK and W_UV the key and value rows of
`kv_b_proj`:

    expanded   score = q_nope · (W_UK c) + q_rot · k_rot        out = Σ p (W_UV c)
    absorbed   score = (q_nope W_UK) · c + q_rot · k_rot        out = W_UV Σ p c

Both are the same sum in another order. On the CPU the C library takes the whole module in one call, on pages of the
cache (paged_attention.py), and kernels take a step of few tokens on a GPU (gpu_attention.py); what follows computes
everywhere else, prompts on a GPU among it.
Letters: B batch, S queries, T cached tokens, A heads, L latent rank, V value size, N and R the sizes of the
parts of a query without and with rotary positions.
"""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ktransformers.loaders import WeightSource
from ktransformers.native import Attention
from ktransformers.operators import attending_latents
from ktransformers.operators.attention_inputs import BUILD_WITH, IMPLEMENTATIONS, check_inputs, update_cache
from ktransformers.operators.combining import has_hooks
from ktransformers.operators.cpu_attention import fused, one_query
from ktransformers.operators.gqa import KLlamaAttention, KQwen3MoeAttention  # noqa: F401  rule files name them here
from ktransformers.operators.packed_weight import ReadWeight
from ktransformers.operators.paged_attention import PagedAttention
from ktransformers.operators.paged_cache import PagedLayer

_NEEDED = (
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scaling"),
    *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
)
_CHILDREN = frozenset(
    {"q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"}
    | {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
)
_ARGUMENTS = frozenset(
    {"self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"}
    | {"cache_position", "use_cache", "output_attentions"}  # these change no number
)
_PLAIN_NUMBERS = frozenset({"scaling", "attention_dropout"})


class KDeepseekV2Attention(PagedAttention):
    """MLA for DeepSeek-V2 (complex rotary factors) and V3 (cos, sin).

    Args:
        chunck_size: queries whose scores are in memory at a time, fp32 [B, A, chunck_size, T], where torch's fused
            kernel, which holds none, does not compute: see `_in_parts` (upstream's spelling).
        absorb_for_prefill: work on the latents whatever the number of queries. Otherwise the form with fewer
            multiplications is taken (`absorbing_is_cheaper`): absorbed to decode, expanded for long prompts.

    W_UK and W_UV are views of `kv_b_proj`. If a rule replaces it by something without a dense `weight`, a
    dense copy is loaded as well.
    """

    kinds = (attending_latents.attending_of,)

    def __init__(
        self,
        key: str,
        gguf_loader: WeightSource,
        config: Any,
        orig_module: nn.Module | None = None,
        prefill_device: str = "cuda",
        generate_device: str | None = None,
        chunck_size: int = 1000,
        absorb_for_prefill: bool = False,
    ):
        super().__init__(key, gguf_loader, config, orig_module, prefill_device, generate_device)
        self.chunck_size = chunck_size
        self.absorb_for_prefill = absorb_for_prefill
        self.config = getattr(orig_module, "config", config)  # the language model's, of several in a model that sees
        self._kv_b: Tensor | None = None  # only where kv_b_proj has no dense weight

    @classmethod
    def check(
        cls, key: str, orig_module: nn.Module, kwargs: Mapping[str, Any], weights: WeightSource | None = None
    ) -> list[str]:
        if differences := _differences(orig_module):
            found = f"found {type(orig_module).__name__} with {'; '.join(differences)}"
            return [f"{cls.__name__} replaces multi-head latent attention as DeepSeek computes it; {found}"]
        problems = []
        masks = getattr(getattr(orig_module, "config", None), "_attn_implementation", None)
        if masks not in IMPLEMENTATIONS:
            problems.append(f"{cls.__name__} takes no masks of attn_implementation {masks!r}. {BUILD_WITH}")
        chunk = kwargs.get("chunck_size", 1)
        if not isinstance(chunk, int) or chunk <= 0:
            problems.append(f"chunck_size: {chunk!r}, expected a positive number of queries")
        return problems

    def load(self) -> None:
        super().load()
        self._have_dense()

    def make_native(self) -> Attention | None:
        self._have_dense()
        return super().make_native()

    def _have_dense(self) -> None:
        if self._kv_b is None and _dense_weight(self.kv_b_proj) is None:
            name, dtype = f"{self.key}.kv_b_proj.weight", self.kv_a_layernorm.weight.dtype
            self._kv_b = self.gguf_loader.tensor(name, device=self.device, dtype=dtype)

    def unload(self) -> None:
        super().unload()
        self._kv_b = None

    def pages(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> PagedLayer | None:
        expands = hidden.shape[1] > 1  # the native call may
        return None if self.absorb_for_prefill and expands else super().pages(hidden, kwargs)

    def otherwise(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [B, S, H] -> ([B, S, H], None, or [B, A, S, T] where attentions are asked for)."""
        check_inputs(type(self).__name__, self.config, attention_mask, kwargs)
        batch, length = hidden_states.shape[:2]
        q_nope, q_rot = self._queries(hidden_states)
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rot = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent).unsqueeze(1)  # [B, 1, S, L]
        interleave = getattr(self.config, "rope_interleave", False)
        q_rot = rotate(q_rot, position_embeddings, interleave)
        k_rot = rotate(k_rot.unsqueeze(1), position_embeddings, interleave)  # [B, 1, S, R]
        latent, k_rot = update_cache(type(self).__name__, past_key_values, latent, k_rot, self.layer_idx)
        mask = attention_mask
        if mask is not None:
            mask = mask[..., : latent.shape[2]]
            mask = mask if mask.dtype == torch.bool else mask.to(latent.dtype)
        elif length > 1:
            # transformers omits the mask only where the cache was empty; beyond, a static one still is empty.
            latent, k_rot = latent[:, :, :length], k_rot[:, :, :length]

        wants_weights = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        absorb = self.absorb_for_prefill or self.absorbing_is_cheaper(length, latent.shape[2])
        absorb = absorb and not self._kv_b_is_wrapped
        attend = self._absorbed if absorb else self._expanded
        out, weights = attend(q_nope, q_rot, latent, k_rot, mask, wants_weights)  # [B, A, S, V]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), weights

    def absorbing_is_cheaper(self, queries: int, cached: int) -> bool:
        """Compare multiplications per head. With V3's sizes and a long cache, 170 queries are the limit."""
        n, r, v, rank = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank
        absorbed = queries * rank * (n + v) + queries * cached * (2 * rank + r)
        expanded = cached * rank * (n + v) + queries * cached * (n + r + v)
        return absorbed <= expanded

    def _queries(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The no-rope [B, A, S, N] and the still unrotated rope part [B, A, S, R] of the queries."""
        if self.q_lora_rank is None:
            q = self.q_proj(hidden)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q = q.view(*hidden.shape[:2], -1, self.qk_nope_head_dim + self.qk_rope_head_dim).transpose(1, 2)
        return q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)

    @property
    def _kv_b_is_wrapped(self) -> bool:
        """Whether `kv_b_proj` became more than its weight since it was loaded: an adapter beside it, a hook."""
        if is_in_torch_dispatch_mode():  # a simulation, which hooks into every module
            return False
        return self._parts.get("kv_b_proj") is not self.kv_b_proj or has_hooks(self.kv_b_proj)

    def _kv_b_weight(self) -> Tensor:
        """`kv_b_proj` as [A * (N + V), L]: for each head the rows of W_UK, then those of W_UV."""
        return _dense_weight(self.kv_b_proj) if self._kv_b is None else self._kv_b

    def _absorbed(
        self, q_nope: Tensor, q_rot: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention on the latents: W_UK goes into the queries, W_UV comes after the sum.

        Args:
            q_nope: [B, A, S, N], and q_rot [B, A, S, R]: the two parts of the queries, the second one rotated.
            latent: [B, 1, T, L], and k_rot [B, 1, T, R]: the cache.
            mask: [B, 1, S, T], bool or added to scores; None is causal with S = T, or S = 1.

        Returns:
            [B, A, S, V], and the weights [B, A, S, T] if they are wanted.
        """
        w_uk, w_uv = self._per_head_weights(latent.dtype)  # [A, N, L], [A, V, L]
        # A latent query can be far larger than any key: scaled before the product, by a power of two, exactly.
        power = 2.0 ** round(math.log2(self.scaling))
        q_latent = torch.einsum("basn,anl->basl", q_nope * power, w_uk)
        query = torch.cat([q_latent, q_rot * power], -1)  # [B, A, S, L + R]
        key = torch.cat([latent, k_rot], -1)  # [B, 1, T, L + R]
        scale = self.scaling / power
        weights = None
        if query.shape[2] == 1 and not wants_weights and not self._dropout:
            context = one_query(query, key, key, mask, scale)[..., : self.kv_lora_rank]
        elif query.device.type == "cpu" and not wants_weights and not self._dropout:
            keys = key.expand(-1, query.shape[1], -1, -1)
            context = fused(query, keys, keys, mask, scale, causal=mask is None)[..., : self.kv_lora_rank]
        else:  # on GPUs also because heads this wide may get a kernel that copies the keys for every head
            context, weights = self._in_parts(query, key, latent, mask, scale, wants_weights)
        return torch.einsum("basl,avl->basv", context, w_uv), weights

    def _expanded(
        self, q_nope: Tensor, q_rot: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention on keys [B, A, T, N + R] and values [B, A, T, V] made of the latents; otherwise as `_absorbed`."""
        per_head = [self.qk_nope_head_dim, self.v_head_dim]
        wrapped, rows = self._kv_b_is_wrapped, latent[:, 0]
        expanded = self.kv_b_proj(rows) if wrapped else F.linear(rows, self._kv_b_weight().to(rows.dtype))
        expanded = expanded.view(*expanded.shape[:2], -1, sum(per_head)).transpose(1, 2)  # [B, A, T, N + V]
        keys, values = expanded.split(per_head, -1)
        query = torch.cat([q_nope, q_rot], -1)
        key = torch.cat([keys, k_rot.expand(-1, keys.shape[1], -1, -1)], -1)
        if wants_weights or self._dropout:
            return self._in_parts(query, key, values, mask, self.scaling, wants_weights)
        return fused(query, key, values, mask, self.scaling, mask is None and query.shape[2] > 1), None

    @property
    def _dropout(self) -> float:
        """The share of attention weights to drop: nothing outside training."""
        return self.attention_dropout if self.training else 0.0

    def _in_parts(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `fused`, `chunck_size` queries at a time, with the weights if they are wanted.

        query [B, A, S, D], key [B, A or 1, T, D], value [B, A or 1, T, V] -> [B, A, S, V], [B, A, S, T] or None.
        Scores are products in fp32: in fp16 those of large keys would be infinite.
        """
        out, weights, key = [], [], key.float().transpose(2, 3)
        for start in range(0, query.shape[2], self.chunck_size):
            part = query[:, :, start : start + self.chunck_size].float() * scale
            probs = F.softmax(_masked(_product(part, key), mask, start), -1).to(value.dtype)
            probs = F.dropout(probs, self._dropout) if self._dropout else probs
            out.append(_product(probs, value))
            weights += [probs] if wants_weights else []
        return torch.cat(out, 2), torch.cat(weights, 2) if wants_weights else None

    def _per_head_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK [A, N, L] and W_UV [A, V, L]: views of `kv_b_proj` where it has `dtype`."""
        per_head = [self.qk_nope_head_dim, self.v_head_dim]
        return self._kv_b_weight().to(dtype).view(-1, sum(per_head), self.kv_lora_rank).split(per_head, 1)


def _differences(module: nn.Module) -> list[str]:
    """What `module` lacks of this attention or has besides; told from its structure, for families share names.

    Families that pass in transformers 5.23 compute the same numbers: deepseek_v2, deepseek_v3, glm4_moe_lite,
    youtu, axk1 and minicpm3.
    """
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if "kv_a_proj_with_mqa" in missing:  # no MLA at all: all else is different too
        return [f"no {', '.join(missing)}"]
    arguments = set(inspect.signature(type(module).forward).parameters)
    parts = {name for name, _ in module.named_children()} - _CHILDREN  # one that is None is not listed
    weights = {name for name, tensor in [*module._parameters.items(), *module._buffers.items()] if tensor is not None}
    factors = {name for name, value in vars(module).items() if _changes_numbers(name, value)}
    found = [
        ("parts of its own", parts | weights),
        ("factors of its own", factors),
        ("a forward that also takes", arguments - _ARGUMENTS),
    ]
    differences = [f"no {', '.join(missing)}"] if missing else []
    differences += [f"{what}: {', '.join(sorted(names))}" for what, names in found if names]
    if "position_embeddings" not in arguments:
        differences.append("no rotary positions (its forward takes no position_embeddings)")
    return differences


def _changes_numbers(name: str, value: Any) -> bool:
    """Whether a plain attribute looks like a factor or window, such as mla_scale_q_lora or sliding_window."""
    if name in _PLAIN_NUMBERS or value is None or value is False:
        return False
    return isinstance(value, float) or re.search("scale|window|softcap", name) is not None


_LOWEST = torch.finfo(torch.float32).min


def _dense_weight(linear: nn.Module) -> Tensor | None:
    """The layer's floating 2-D weight, if it has one."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, ReadWeight):
        return None
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, A, S, X] x [B, A or 1, X, Y] -> [B, A, S, Y]; one product per sequence if heads share `right`."""
    if right.shape[1] == left.shape[1]:
        return left @ right
    b, a, s, x = left.shape
    return (left.reshape(b, a * s, x) @ right[:, 0]).view(b, a, s, -1)


def _masked(scores: Tensor, mask: Tensor | None, start: int) -> Tensor:
    """Mask fp32 scores [B, A, chunk, T] of the queries from `start` on. No mask: causal, first on first."""
    chunk, cached = scores.shape[2:]
    if mask is None:
        if start == 0 and chunk == 1:
            return scores  # one query: the newest token, which sees all
        at = torch.arange(start, start + chunk, device=scores.device).unsqueeze(1)
        return scores.masked_fill(torch.arange(cached, device=scores.device) > at, _LOWEST)
    part = mask[:, :, start : start + chunk]
    # Not -inf: a row with nothing to attend to (left padding) must stay finite, for it enters the cache.
    return scores.masked_fill(~part, _LOWEST) if part.dtype == torch.bool else scores + part


def rotate(x: Tensor, position_embeddings: Any, interleave: bool) -> Tensor:
    """Apply rotary positions to x [B, heads, S, R] as the family does, the layout of the result included.

    Args:
        position_embeddings: complex factors [B or 1, S, R/2] (DeepSeek-V2: pairs stay neighbours), or
            (cos, sin) of [B or 1, S, R] each.
        interleave: with (cos, sin), whether pairs are neighbours in x; in the result they are R/2 apart.
    """
    if isinstance(position_embeddings, Tensor):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * position_embeddings.unsqueeze(1).to(x.device)).flatten(3).type_as(x)
    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].unsqueeze(1).to(x.device) for t in position_embeddings)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :half], x[..., half:])
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
