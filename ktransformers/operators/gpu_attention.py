"""Attention of a few new tokens on a GPU, by kernels over pages of its memory (gpu_pages.py): decoding, and what a
graph captures. A prompt goes by the family's own code and torch's fused attention, over the same pages.

Projections are the operator's children, whatever holds their weights. Between them one launch norms, turns and keeps,
one or two attend. Nothing waits for the GPU, but for masks that a caller gives, which are compared with what kernels
see once a step. What a module computes is recognized as it is for C (attending.py, attending_latents.py).
Letters: B sequences, T new tokens of each, N = B * T, A heads, C of keys and values, H hidden; L latent rank, P and V
sizes of a latent key's rotary part and of a value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.kernels import gqa_decode, mla_decode
from ktransformers.kernels.cache import append
from ktransformers.kernels.context import Context, visible
from ktransformers.kernels.gqa_decode import Scores
from ktransformers.kernels.keep import keep, keep_latents
from ktransformers.native import torch_ops
from ktransformers.native.checks import DTYPES
from ktransformers.operators import gpu_ops
from ktransformers.operators.attending import GATES_BY, PROJECTIONS, Attending, turned
from ktransformers.operators.attending_latents import Latents
from ktransformers.operators.attention_inputs import only_hides
from ktransformers.operators.gpu_pages import FEW, GpuLayer, GpuPages
from ktransformers.operators.joined import Joined


def gpu_attention(operator: nn.Module) -> "GpuAttention | str":
    """What computes an operator's few tokens on its GPU, or why nothing does."""
    if problem := gpu_ops.why_not(operator):
        return problem
    operator.recognize()
    attending = operator.attending
    kind = {Attending: GpuGrouped, Latents: GpuLatents}.get(type(attending))
    if kind is None:
        return "what it computes is not known"
    return kind.refuses(attending) or kind(attending, operator)


class GpuAttention:
    """What is the same for grouped queries and latents."""

    def __init__(self, attending: Any) -> None:
        self.attending = attending
        self.number = torch_ops.name_it(self)

    def forward(self, operator: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """hidden [B, T, H] -> [B, T, H], its tokens kept; None where the operator's other code has to compute."""
        held, plain = layer_of(operator, hidden, kwargs)
        if held is None:
            return None
        batch, tokens = hidden.shape[:2]
        held.prepare(batch, *self.attending.kept, hidden.dtype, hidden.device)
        step = Step(held, held.enter(tokens), tokens)
        mask = None if plain else kwargs.get("attention_mask")
        if mask is not None and (starts := step.starts(mask)) is None:
            return None
        step.begin = None if mask is None else starts
        out = self.compute(operator, hidden, step, kwargs)
        held.advanced(held.length + tokens)
        return out

    def attend(self, q: list[Tensor], k: Tensor, v: Tensor, angles: Any, step: "Step") -> Tensor:
        """Keep k [N, C, D] and v [N, C, V], and attend: [N, A, width]."""
        held, tables = step.held, step.held.tables
        cos, sin = angles or (None, None)
        return gpu_ops.attend(
            q, k, v, cos, sin, step.slots, list(held.pages), tables.table, tables.lengths, step.begin, self.number
        )

    def angles(self, kwargs: Mapping[str, Any], batch: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin [N, R/2] of the step's tokens; None where nothing turns."""
        if not self.attending.rotates:
            return None
        given = kwargs["position_embeddings"]
        cos, sin = (given.real, given.imag) if isinstance(given, Tensor) else given
        how = self.attending.shape.angles
        if how == "twice":
            cos, sin = (x[..., : x.shape[-1] // 2] for x in (cos, sin))
        elif how == "beside":
            cos, sin = cos[..., ::2], sin[..., ::2]
        cos, sin = (x.expand(batch, -1, -1).flatten(0, 1) for x in (cos, sin))
        return (cos, sin) if cos.stride(-1) == 1 else (cos.contiguous(), sin.contiguous())


@dataclass
class Step:
    """Where the tokens of a step go, in one layer. `begin`: int32 [B], tokens before are not seen; None for none."""

    held: GpuLayer
    slots: Tensor
    tokens: int
    begin: Tensor | None = None

    def starts(self, mask: Tensor) -> Tensor | None:
        """The first token of each sequence, int32 [B], that a mask [B or 1, 1, T, tokens] shows; None for a mask that
        is more than that and a window. Waits for the GPU, once a step and window."""
        read = self.held.room.masks
        if self.held.window not in read or read[self.held.window][0] is not mask:
            read[self.held.window] = mask, self._read(mask)
        return read[self.held.window][1]

    def _read(self, mask: Tensor) -> Tensor | None:
        total, first = self.held.get_mask_sizes(self.tokens)
        if not only_hides(mask, self.tokens) or mask.shape[-1] != total:
            return None
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(self.held.batch, -1, -1)
        starts = seen[:, 0].int().argmax(-1).int() + first
        context = self.held.tables.context
        expected = visible(Context(context.table, context.lengths, starts), self.tokens, self.held.window)
        return starts if torch.equal(expected[..., first : first + total], seen) else None


def layer_of(operator: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[GpuLayer | None, bool]:
    """The operator's layer of the cache, and whether masks say nothing; None where kernels do not compute this."""
    cache = kwargs.get("past_key_values")
    if type(cache) is not GpuPages or hidden.shape[1] > FEW or hidden.dtype not in DTYPES:
        return None, False
    if torch.compiler.is_compiling() or not operator.asks_for_no_more(hidden, kwargs):
        return None, False
    held = cache.layers[operator.layer_idx]
    return held if isinstance(held, GpuLayer) else None, cache.plain


# --- grouped queries -------------------------------------------------------------------------------------------------


class GpuGrouped(GpuAttention):
    """Of grouped queries. `width`: of what attention gives for a head."""

    def __init__(self, attending: Attending, operator: nn.Module) -> None:
        super().__init__(attending)
        s = attending.shape
        self.width = s.value_size
        self._scores: Scores | None = None
        each_head = attending.norms is not None and not s.norm_whole
        self._norms = [operator._modules[name] for name in attending.norms or () if each_head]
        known = all(getattr(norm, "weight", None) is not None for norm in self._norms) and not s.norm_last
        names = [name for name in PROJECTIONS if operator._modules.get(name) is not None]
        self._made = Joined([operator._modules[name] for name in names])
        self._fused = known and attending.rotates and attending.growth is None and not attending.given_factor

    @staticmethod
    def refuses(attending: Attending) -> str:
        """Why kernels do not compute this, or ``""``."""
        largest, most = max(attending.shape.size, attending.shape.value_size), gqa_decode.MOST_SIZE
        return f"its heads of {largest} are larger than {most}" if largest > most else ""

    def compute(self, operator: nn.Module, hidden: Tensor, step: Step, kwargs: Mapping[str, Any]) -> Tensor:
        a, s = self.attending, self.attending.shape
        batch, tokens = hidden.shape[:2]
        q, k, v, gate = self._projected(operator, hidden)
        if self._fused and kwargs.get("position_embeddings") is not None:
            angles = self.angles(kwargs, batch)
        else:
            q, k = (self._placed(x, i, kwargs) for i, x in enumerate((q, k)))
            factor, angles = self._factor(step, kwargs), None
            q = q if factor is None else q * factor[..., None, None].to(q.dtype)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        self._scores = Scores(s.scale, step.held.window, a.cap, None if a.sinks is None else getattr(operator, a.sinks))
        out = self.attend([q], k, v, angles, step).view(batch, tokens, -1)
        out = out if gate is None else out * GATES_BY[s.gate_by](gate)
        return operator._modules[a.out](out)

    def _projected(self, operator: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries [B, T, A, D], keys [B, T, C, D] and values [B, T, C, V] before norms of heads and positions, and the
        gate [B, T, A * V]."""
        a, s, parts = self.attending, self.attending.shape, operator._modules
        q, k, *v = self._made(hidden)
        v = v[0] if v else k
        gate = None
        if s.gate == "in_q":
            q, gate = q.unflatten(-1, (s.heads, 2 * s.size)).chunk(2, -1)
            gate = gate.flatten(2)
        elif s.gate is not None:
            gate = parts[a.gate](hidden)
            gate = gate if a.gate_bias is None or s.gate != "heads" else gate + getattr(operator, a.gate_bias)
            gate = gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1)
            if a.gate_bias is not None and s.gate == "elements":
                gate = gate + getattr(operator, a.gate_bias).repeat_interleave(s.value_size)
        if s.norm_whole and a.norms is not None:
            q, k = (self._normed(x, parts[name]) for x, name in zip((q, k), a.norms, strict=True))
        if s.clip:
            q, k, v = (x.clamp(-s.clip, s.clip) for x in (q, k, v))
        q, k, v = (x if x.dim() == 4 else x.unflatten(-1, (-1, size))
                   for x, size in ((q, s.size), (k, s.size), (v, s.value_size)))  # fmt: skip
        if a.value_norm is not None:
            v = self._normed(v, parts[a.value_norm])
        return q, k, v * s.value_factor if s.value_factor else v, gate

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        a = self.attending
        return gpu_ops.rms_norm(x, getattr(norm, "weight", None), a.shape.eps, a.norm_plus_one)

    def _placed(self, x: Tensor, which: int, kwargs: Mapping[str, Any]) -> Tensor:
        """What `keep` does to queries (0) or keys (1) [B, T, heads, D], and what it does not, in torch."""
        s = self.attending.shape
        if self._norms and not s.norm_last:
            x = self._normed(x, self._norms[which])
        given = kwargs.get("position_embeddings") if self.attending.rotates else None
        if given is not None:
            given = (given.real, given.imag) if isinstance(given, Tensor) else given
            x = turned(x.transpose(1, 2), given, s).transpose(1, 2).to(x.dtype)
        return self._normed(x, self._norms[which]) if self._norms and s.norm_last else x

    def _factor(self, step: Step, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What queries are multiplied by, [B or 1, T]."""
        if self.attending.growth is not None:
            lengths = step.held.tables.lengths
            first = lengths - step.tokens if step.begin is None else lengths - step.tokens - step.begin
            places = first[:, None] + torch.arange(step.tokens, device=lengths.device)
            return self.attending.growth.of(places)
        given = kwargs.get(self.attending.given_factor) if self.attending.given_factor else None
        return None if given is None else given[:, 0, :, 0]

    def launch(
        self, q: list[Tensor], k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor,
        pages: list[Tensor], table: Tensor, lengths: Tensor, starts: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `attend`, past torch's dispatcher; queries turn in place."""
        a, queries = self.attending, q[0]
        if cos is None:
            append(k, v, slots, *pages)
        else:
            q_norm, k_norm = (norm.weight.detach() for norm in self._norms) if self._norms else (None, None)
            keep(queries, k, v, cos, sin, slots, *pages, pairs=a.shape.pairs, q_norm=q_norm, k_norm=k_norm,
                 eps=a.shape.eps, plus_one=a.norm_plus_one)  # fmt: skip
        queries = queries.unflatten(0, (len(lengths), -1))
        return gqa_decode.gqa_decode(queries, *pages, Context(table, lengths, starts), self._scores).flatten(0, 1)


# --- latents ---------------------------------------------------------------------------------------------------------


class GpuLatents(GpuAttention):
    """Of latents, absorbed: queries meet them as they are kept. `width`: their rank."""

    def __init__(self, attending: Latents, operator: nn.Module) -> None:
        super().__init__(attending)
        self.width = attending.shape.latent
        weight = getattr(operator, "_kv_b", None)
        if weight is None and not _is_dense(operator.kv_b_proj):
            name, norm = f"{operator.key}.kv_b_proj.weight", operator.kv_a_layernorm.weight
            weight = operator.gguf_loader.tensor(name, device=norm.device, dtype=norm.dtype)
        self._kv_b = weight
        first = "q_a_proj" if operator._modules.get("q_a_proj") is not None else attending.queries
        self._made = Joined([operator._modules[first], operator.kv_a_proj_with_mqa])
        self._norm = operator.kv_a_layernorm.weight.detach()
        if attending.kv_factor != 1.0:
            self._norm = self._norm.float() * attending.kv_factor

    @staticmethod
    def refuses(attending: Latents) -> str:
        """Why kernels do not compute this, or ``""``."""
        if attending.shape.latent > mla_decode.MOST_LATENTS:
            return f"its latents of {attending.shape.latent} are larger than {mla_decode.MOST_LATENTS}"
        found = {"an index of keys": attending.narrow, "sinks": attending.sinks,
                 "latents without positions": not attending.rotates}  # fmt: skip
        return " and ".join(f"the kernel does not know {what}" for what, there in found.items() if there)

    def compute(self, operator: nn.Module, hidden: Tensor, step: Step, kwargs: Mapping[str, Any]) -> Tensor:
        a, s, parts = self.attending, self.attending.shape, operator._modules
        count = hidden.shape[0] * hidden.shape[1]
        q, latent = self._made(hidden)
        q, gate = self._queries(operator, hidden, q)
        latent, rotary = latent.flatten(0, 1).split([s.latent, s.rotary], -1)
        if a.key_norm is not None:
            rotary = gpu_ops.rms_norm(rotary, parts[a.key_norm].weight.detach(), s.key_eps)
        w_uk, w_uv = self._per_head(operator, hidden.dtype)
        plain, turning = q.split([s.plain, s.rotary], -1)
        query = q.new_empty(count, s.heads, s.latent + s.rotary)
        torch.bmm(plain.transpose(0, 1), w_uk, out=query[..., : s.latent].transpose(0, 1))
        angles = self.angles(kwargs, hidden.shape[0])
        found = self.attend([query, turning], latent[:, None], rotary[:, None], angles, step)
        out = q.new_empty(count, s.heads, s.value_size)
        torch.bmm(found.transpose(0, 1), w_uv.transpose(1, 2), out=out.transpose(0, 1))
        out = out.view(*hidden.shape[:2], -1)
        return parts["o_proj"](out if gate is None else out * gate.sigmoid())

    def _queries(self, operator: nn.Module, hidden: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [N, A, plain + rotary], before positions, and the gate [B, T, A * V]; `q` or its latent is made."""
        a, s, parts = self.attending, self.attending.shape, operator._modules
        if parts.get("q_a_proj") is not None:
            made, latent = parts[a.queries], gpu_ops.rms_norm(q, parts["q_a_layernorm"].weight.detach(), s.q_eps)
            q = made(torch.cat((latent, q), -1) if made.in_features > q.shape[-1] else latent)
        q = q.flatten(0, 1).unflatten(-1, (s.heads, -1))
        if _power(self._scale, q.dtype) != 1.0:
            q = q * _power(self._scale, q.dtype)
        q, gate = q.split([s.plain + s.rotary, q.shape[-1] - s.plain - s.rotary], -1)
        if s.gate == "in_q":
            return q, gate.reshape(*hidden.shape[:2], -1)
        if s.gate is None:
            return q, None
        gate = parts[a.gate](hidden)
        return q, gate if s.gate == "elements" else gate.repeat_interleave(s.value_size, -1)

    @property
    def _scale(self) -> float:
        return self.attending.shape.scale * self.attending.q_factor

    def _per_head(self, operator: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What makes keys [A, plain, L] and values [A, V, L] of latents: views of `kv_b_proj` where it has `dtype`."""
        s = self.attending.shape
        weight = operator.kv_b_proj.weight if self._kv_b is None else self._kv_b
        return weight.detach().to(dtype).view(s.heads, -1, s.latent).split([s.plain, s.value_size], 1)

    def launch(
        self, q: list[Tensor], k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pages: list[Tensor],
        table: Tensor, lengths: Tensor, starts: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `attend`, past torch's dispatcher; the end of the absorbed queries is written."""
        s, (query, turning), (cache,) = self.attending.shape, q, pages
        group = mla_decode.group_of(s.latent) if cache.dtype == torch.uint8 else 0
        keep_latents(turning, k[:, 0], v[:, 0], cos, sin, slots, cache, to_q=query[..., s.latent :], weight=self._norm,
                     eps=s.kv_eps, pairs=s.pairs, group=group)  # fmt: skip
        query = query.unflatten(0, (len(lengths), -1))
        context = Context(table, lengths, starts)
        scale = self._scale / _power(self._scale, query.dtype)
        return mla_decode.mla_decode(query, cache, context, s.latent, scale, group=group).flatten(0, 1)


def _power(scale: float, dtype: torch.dtype) -> float:
    """In half precision an absorbed query may be larger than any number: scaled before, by a power of two, exactly."""
    return 2.0 ** round(math.log2(scale)) if dtype == torch.float16 else 1.0


def _is_dense(linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
