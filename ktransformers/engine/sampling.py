"""How the next token is chosen and when an answer ends, as `model.generate` of transformers does it.

The processors are transformers' own, built by its own code, so that every field of a GenerationConfig means here what
it means there. What one streamed answer cannot honour is in two tables below.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ktransformers import native
from ktransformers.errors import KTransformersError

_BEAMS = "an answer is shown as it is made, so there is no beam search"
_HUB = "transformers itself no longer has this way of decoding"

UNHONOURED = {
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "num_return_sequences": "one answer is given",
    "penalty_alpha": _HUB,
    "dola_layers": _HUB,
    "token_healing": "a chat prompt ends with tokens of its template, which must stay as they are",
}
"""Fields of a GenerationConfig that would change the answer and cannot be honoured, and why."""

_SPEED = "changes how fast tokens come, not which"
_CACHE = "the cache is the one that the model makes itself"
_OUTPUT = "concerns what generate returns besides tokens"
_PADDING = "there is no padding, as there is one sequence"

WITHOUT_EFFECT = {
    "early_stopping": "read by beam search only",
    "length_penalty": "read by beam search only",
    "low_memory": "read by contrastive search only",
    "use_mtp": _SPEED,
    "is_assistant": _SPEED,
    "num_assistant_tokens": _SPEED,
    "num_assistant_tokens_schedule": _SPEED,
    "assistant_confidence_threshold": _SPEED,
    "assistant_early_exit": _SPEED,
    "assistant_lookbehind": _SPEED,
    "assistant_ensemble_weight": "read only with an assistant model, which is an argument of generate",
    "target_lookbehind": _SPEED,
    "speculation_type": _SPEED,
    "prompt_lookup_num_tokens": _SPEED,
    "max_matching_ngram_size": _SPEED,
    "compile_config": _SPEED,
    "disable_compile": _SPEED,
    "continuous_batching_config": _SPEED,
    "prefill_chunk_size": "the caller says the size of a chunk",
    "use_cache": _SPEED,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "pad_token_id": _PADDING,
    "bos_token_id": "the chat template or the tokenizer writes it",
    "decoder_start_token_id": "read by encoder-decoder models only",
    "transformers_version": "says who wrote the file",
}
"""Fields that change nothing about the answer, and why. Every field in neither table is honoured."""


@dataclass(frozen=True)
class Sampling:
    """A GenerationConfig with transformers' defaults filled in; greedy without one.

    `stop_ids` are added to the config's end-of-sequence ids. A temperature of 0 means greedy decoding, where
    transformers refuses it.
    """

    config: GenerationConfig = field(default_factory=GenerationConfig)
    stop_ids: Collection[int] = frozenset()

    def __post_init__(self) -> None:
        config = copy.deepcopy(self.config)
        for name, value in GenerationConfig._get_default_generation_params().items():
            if getattr(config, name, None) is None and name != "max_length":  # 20 tokens, which is no answer
                setattr(config, name, value)
        if config.temperature == 0:
            config.do_sample, config.temperature = False, 1.0
        eos = config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "stop_ids", frozenset([*eos, *self.stop_ids]))

    def greedy(self) -> "Sampling":
        """The same without chance: penalties and suppressed tokens stay."""
        config = copy.deepcopy(self.config)
        config.do_sample = False
        return Sampling(config, self.stop_ids)

    def unhonoured(self) -> dict[str, str]:
        """The fields that are set to something that has no effect here though it should: field -> why."""
        defaults = GenerationConfig._get_default_generation_params()
        set_to = {name: getattr(self.config, name, None) for name in UNHONOURED}
        return {name: UNHONOURED[name] for name, value in set_to.items() if value and value != defaults.get(name)}


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        model: a transformers causal LM, which builds the processors.
        prompt: the token ids that the answer follows.
        max_new_tokens: where a `forced_eos_token_id` is forced.
        tokenizer: needed for `stop_strings` only.
        generator: of this answer's own chance; None is torch's global one, and the numbers that `generate` would draw.
        adjust: changes scores, float32 [vocab], in place, before all else.

    Raises:
        KTransformersError: a value that transformers refuses, or stop strings without a tokenizer.
    """

    def __init__(
        self,
        sampling: Sampling,
        model: nn.Module,
        prompt: Sequence[int],
        max_new_tokens: int,
        tokenizer: Any = None,
        generator: torch.Generator | None = None,
        adjust: Callable[[torch.Tensor], None] | None = None,
    ):
        self._generator, self._adjust = generator, adjust
        config = copy.deepcopy(sampling.config)
        config.eos_token_id = sorted(sampling.stop_ids) or None
        config.max_length = len(prompt) + max_new_tokens
        self._ids = torch.tensor([list(prompt)], device=model.device)  # [1, tokens], prompt and answer
        self._do_sample = bool(config.do_sample)
        try:
            self.processors = _processors(config, model, self._ids)
            self._criteria = _criteria(config, tokenizer)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # each processor has its own
            reason = str(error).strip().splitlines()[0]
            raise KTransformersError(
                f"generation_config: transformers refuses it: {reason}. Correct generation_config.json."
            ) from error

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor) -> int:
        """The next token's id from `logits`, float [vocab] of any dtype. Raises KTransformersError for NaN."""
        likeliest = largest(logits)
        if logits[likeliest].isnan():  # it counts as the largest
            raise KTransformersError(
                "logits: the model gave NaN. Its weights are damaged, or numbers outgrew float16: check them, "
                "or set dtype in config.json to bfloat16 or float32."
            )
        if not self.processors and not self._criteria and not self._do_sample and self._adjust is None:
            return likeliest
        scores = logits[None].to(self._ids.device, torch.float32, copy=self._adjust is not None)
        if self._adjust is not None:
            self._adjust(scores[0])
        if self.processors:
            scores = self.processors(self._ids, scores)
        if self._do_sample:
            token = _drawn(torch.softmax(scores, dim=-1), self._generator)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        if self.processors or self._criteria:
            self._ids = torch.cat([self._ids, token], dim=-1)
        return int(token)

    def ended(self) -> bool:
        """Whether the last token completed a stop string, or time is up."""
        return bool(self._criteria) and bool(self._criteria(self._ids, None).all())


def _drawn(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """[1, 1] of [1, vocab]. With a generator by one number of chance, looked up in the sums."""
    if generator is None:
        return torch.multinomial(probabilities, num_samples=1)
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    where = torch.rand(1, 1, generator=generator, dtype=torch.float64).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, where, right=True).clamp(max=sums.shape[-1] - 1)


def largest(logits: torch.Tensor) -> int:
    """The likeliest token by `logits` [V]: torch's argmax, which reads 16 bits at a quarter of a gigabyte a second."""
    known = logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.device.type == "cpu"
    return native.argmax(logits) if known and native.available() else int(logits.argmax())


class OnCandidates(LogitsProcessor):
    """Top-k and what follows it, computed on the tokens that top-k leaves: top-p alone would sort the vocabulary.

    None of `rest` asks which tokens the scores are of, or sees those whose score is -inf.
    """

    def __init__(self, top_k: int, rest: Sequence[LogitsProcessor]) -> None:
        self.top_k, self.rest = top_k, list(rest)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores float32 [1, vocab] -> [1, vocab], -inf for what is never chosen."""
        least = scores.topk(min(self.top_k, scores.shape[-1])).values[0, -1]
        places = (scores[0] >= least).nonzero()[:, 0]
        kept = scores[:, places]
        for processor in self.rest:
            kept = processor(input_ids, kept)
        return torch.full_like(scores, -torch.inf).index_copy_(1, places, kept)


_BY_SCORE = (TopPLogitsWarper, MinPLogitsWarper, TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper,
             TopHLogitsWarper, LogitNormalization)  # fmt: skip


def on_candidates(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The same choice with less work, where all that follows top-k goes by scores alone."""
    at = next((i for i, each in enumerate(processors) if type(each) is TopKLogitsWarper), None)
    rest = [] if at is None else processors[at + 1 :]
    if not rest or not all(type(each) in _BY_SCORE for each in rest):
        return processors
    return LogitsProcessorList([*processors[:at], OnCandidates(processors[at].top_k, rest)])


def _processors(config: GenerationConfig, model: nn.Module, prompt: torch.Tensor) -> LogitsProcessorList:
    """What `model.generate` would build for `prompt`, int64 [1, tokens]. `config` is changed."""
    model._prepare_special_tokens(config, device=prompt.device)
    made = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,  # what generate takes for the encoder's input of a decoder alone
        device=prompt.device,
    )
    return on_candidates(made)


def _criteria(config: GenerationConfig, tokenizer: Any) -> StoppingCriteriaList:
    """What ends an answer besides its stop tokens and its length."""
    criteria = StoppingCriteriaList()
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(max_time=config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need a tokenizer")
        criteria.append(StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer))
    return criteria
