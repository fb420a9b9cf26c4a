"""How much memory a training run takes, before anything is loaded: from a training file and the model's config.

The step is simulated (simulator/training.py) as the trainer does it: adapters by PEFT, the loss by TRL, the optimizer
by transformers. Only Python, torch and the libraries themselves are a constant.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.configs import meta_model, read_config
from ktransformers.engine.load import model_paths
from ktransformers.errors import KTransformersError, SFTError
from ktransformers.machine import system
from ktransformers.machine.units import format_bytes
from ktransformers.models import DEFAULT_RULES
from ktransformers.planner.formats import format_of
from ktransformers.planner.plan import BASE_GPU
from ktransformers.sft import targets, trainers, whole
from ktransformers.sft.adapters import adapter_path
from ktransformers.sft.options import Options
from ktransformers.sft.rules import rule_of
from ktransformers.simulator.fake import swapped
from ktransformers.simulator.training import TrainingMemory, simulate_training

BASE = 570 << 20
"""Bytes that Python, torch, transformers, PEFT, TRL and datasets hold once they have trained a step, measured."""

PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "work")


@dataclass
class Prediction:
    """What a run takes at its peak, at `tokens` tokens in each of `rows` sequences of a step. Sizes are bytes.

    `memory`: device -> bytes of PARTS, and of "total" and "capacity".
    `trained`, `trained_in_experts`: values.
    """

    model: str
    format: str
    rows: int
    tokens: int
    checkpointing: bool
    trained: int
    trained_in_experts: int
    memory: dict[str, dict[str, int]]

    @property
    def problems(self) -> list[str]:
        return [device for device, m in self.memory.items() if m["total"] > m["capacity"]]

    @property
    def fits(self) -> bool:
        return not self.problems


def predict(options: Options, capacity: Mapping[str, int], form: str = "") -> Prediction:
    """The memory of training as `options` say on devices of `capacity` bytes: "cpu", then GPUs in order.

    `form`: a format of weights, as `planner.formats.format_of` takes it, for a model of which there is a config alone.
    Raises KTransformersError for a model, rules or targets that are none, SFTError for a step that cannot be simulated:
    code that needs numbers, or that TRL or PEFT does not take.
    """
    if len(capacity) > 1 and not torch.backends.cuda.is_built():
        raise KTransformersError(
            "--train on GPUs: torch's gradients know no CUDA device in a CPU build of torch. Plan for the CPU alone; "
            "with a build for CUDA it is untested."
        )
    name, weights = options.model_name_or_path, options.kt_weight_path
    if not name:
        name, weights = model_paths("", weights)
    config = read_config(name)
    net = meta_model(config)
    stored = format_of(name, config, net, weights or None, form or None)
    rule = rule_of(options.kt_optimize_rule, lambda text: None) or DEFAULT_RULES.get(config.model_type, "Default")
    step = _Step(options, trainers.arguments(options))
    with _quiet(), _tiles_of(net.get_output_embeddings()), _told(name):
        found = simulate_training(
            net, rule, step.prepare, step.loss, step.optimizer, gpus=len(capacity) - 1, weights=stored.source,
            size=stored.stored, form=stored.layout, checkpoints=bool(step.args.gradient_checkpointing),
        )  # fmt: skip
    return Prediction(
        name, stored.name, step.rows, options.cutoff_len, step.args.gradient_checkpointing, *step.trained,
        _table(found, capacity),
    )  # fmt: skip


class _Step:
    """A training step of the trainer that a file asks for."""

    def __init__(self, options: Options, args: Any) -> None:
        self.options, self.args, self.trained = options, args, (0, 0)
        self.whole_logits = options.stage == "dpo" and options.pref_loss in ("orpo", "simpo")
        self.rows = args.per_device_train_batch_size * (2 if options.stage == "dpo" else 1)

    def prepare(self, model: nn.Module) -> nn.Module:
        from trl.trainer.utils import add_fused_lm_head

        if not self.whole_logits:
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        net = self._trained(model)
        if self.args.gradient_checkpointing:
            net.enable_input_require_grads()
            given = {"use_reentrant": False} | (self.args.gradient_checkpointing_kwargs or {})
            here = {"preserve_rng_state": False}  # of devices that are not there
            net.gradient_checkpointing_enable(given | here)
        self.trained = targets.count(net)
        return net

    def _trained(self, model: nn.Module) -> nn.Module:
        from peft import PeftConfig, get_peft_model

        if self.options.finetuning_type != "lora":
            whole.unfreeze_by(model, self.options)
            return model
        if before := self.options.adapter_name_or_path:
            return get_peft_model(model, PeftConfig.from_pretrained(adapter_path(before)))
        return get_peft_model(model, targets.lora_config(model, self.options))

    def loss(self, net: nn.Module) -> Tensor:
        ids = torch.zeros((self.rows, self.options.cutoff_len), dtype=torch.int64, device=net.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            if not self.whole_logits:
                return net(**given, labels=ids.clone(), fused_lm_head=True).loss
            logits = net(**given, use_cache=False).logits[:, :-1]
            return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum()

    def optimizer(self, trained: Iterable[Tensor]) -> Any:
        from transformers import Trainer

        kind, given = Trainer.get_optimizer_cls_and_kwargs(self.args)
        return kind(list(trained), **given)


def capacity_here() -> dict[str, int]:
    """What this machine has for this process, with what the process holds already."""
    found = {"cpu": system.memory()[1] + system.peak_memory()}
    return found | {f"cuda:{i}": torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count())}


def in_words(found: Prediction) -> str:
    """A line on what is expected, for who starts a run."""
    parts = []
    for device, row in found.memory.items():
        each = ", ".join(f"{name} {format_bytes(row[name])}" for name in PARTS if row[name])
        parts.append(f"{format_bytes(row['total'])} of {format_bytes(row['capacity'])} on {device} ({each})")
    text = f"memory at most: {'; '.join(parts)}"
    return text if found.fits else f"{text}. {ADVICE}"


ADVICE = ("It does not fit: lower per_device_train_batch_size, cutoff_len or lora_rank, keep gradient checkpointing, "
          "or take weights in a smaller format.")  # fmt: skip


def _table(found: TrainingMemory, capacity: Mapping[str, int]) -> dict[str, dict[str, int]]:
    made = {}
    for device, most in capacity.items():
        on_cpu = device == "cpu"
        tables = (found.weights, found.trained, found.gradients, found.states, found.activations)
        work = found.workspace + BASE if on_cpu else BASE_GPU
        row = dict(zip(PARTS, (*(table.get(device, 0) for table in tables), work), strict=True))
        made[device] = row | {"total": sum(row.values()), "capacity": most}
    return made


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What torch, transformers, PEFT and TRL raise inside, as one of our errors."""
    try:
        yield
    except KTransformersError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"{name}: a training step of it cannot be simulated, so its memory is not known: {reason}"
        raise SFTError(why) from error


@contextlib.contextmanager
def _tiles_of(head: Any) -> Iterator[None]:
    """TRL makes room for logits of 32 768 tokens of a vocabulary at a time, and of a smaller one touches its part."""
    from trl.trainer import utils

    name, rows = "_CHUNKED_LOGPROB_CHUNK_SIZE", getattr(head, "out_features", None)
    with swapped(utils, name, min(rows, getattr(utils, name))) if rows else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
