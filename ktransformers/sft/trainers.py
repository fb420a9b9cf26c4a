"""The trainer of TRL that a training file asks for, and its arguments. Training itself is TRL's and transformers'."""

import os
import warnings
from dataclasses import fields
from typing import Any

import torch

from ktransformers.errors import SFTError
from ktransformers.sft.data import Example
from ktransformers.sft.encode import encode_all
from ktransformers.sft.options import Options

Split = tuple[Any, Any]
"""Datasets to train on and to evaluate on; None where there is none."""


def make(model: Any, tokenizer: Any, options: Options, split: Split, config: Any, callbacks: list[Any]) -> Any:
    """A trainer of `model` with a new adapter by `config`; None keeps the one that the model has."""
    kind, _ = _kind(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = arguments(options)
        made = kind()(
            model=model, args=args, train_dataset=split[0], eval_dataset=split[1], processing_class=tokenizer,
            peft_config=config, callbacks=callbacks,
        )  # fmt: skip
    from transformers import PrinterCallback, ProgressCallback

    for shown in (PrinterCallback, ProgressCallback):  # what is shown is the caller's
        made.remove_callback(shown)
    return made


def arguments(options: Options) -> Any:
    """What a training file says to the trainer that it asks for, as that trainer's own kind of arguments."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it is read when ORPO's and CPO's are imported
    return _kind(options)[1](options)


def _kind(options: Options) -> tuple[Any, Any]:
    own = options.pref_loss if options.pref_loss in ("orpo", "simpo") else "dpo"
    return _KINDS["sft" if options.stage == "sft" else own]


def _sft() -> Any:
    from trl import SFTTrainer

    return SFTTrainer


def _dpo() -> Any:
    from trl import DPOTrainer

    return DPOTrainer


def _orpo() -> Any:
    from trl.experimental.orpo import ORPOTrainer

    return ORPOTrainer


def _cpo() -> Any:
    from trl.experimental.cpo import CPOTrainer

    return CPOTrainer


def _sft_arguments(options: Options) -> Any:
    from trl import SFTConfig

    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}} if not options.packing else {}
    return _made(SFTConfig, options, max_length=options.cutoff_len, packing=options.packing, **skip)


def _dpo_arguments(options: Options) -> Any:
    from trl import DPOConfig

    return _made(
        DPOConfig, options, beta=options.pref_beta, loss_type=[options.pref_loss], max_length=options.cutoff_len,
        label_smoothing=options.dpo_label_smoothing,
    )  # fmt: skip


def _orpo_arguments(options: Options) -> Any:
    from trl.experimental.orpo import ORPOConfig

    return _made(ORPOConfig, options, beta=options.pref_beta, max_length=options.cutoff_len, max_completion_length=None)


def _cpo_arguments(options: Options) -> Any:
    from trl.experimental.cpo import CPOConfig

    return _made(
        CPOConfig, options, beta=options.pref_beta, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=options.simpo_gamma,
        max_length=options.cutoff_len, max_completion_length=None,
    )  # fmt: skip


_KINDS = {"sft": (_sft, _sft_arguments), "dpo": (_dpo, _dpo_arguments), "orpo": (_orpo, _orpo_arguments),
          "simpo": (_cpo, _cpo_arguments)}  # fmt: skip


def _made(kind: type, options: Options, **own: Any) -> Any:
    """Arguments of a kind: the file's, ours, and defaults of LLaMA-Factory's where TRL has others."""
    given = {"report_to": "none", "logging_steps": 5, "save_strategy": "steps" if options.do_train else "no"}
    given |= {"lr_scheduler_type": "linear", "learning_rate": 5e-5, "per_device_train_batch_size": 8}
    given |= {"gradient_checkpointing": not options.disable_gradient_checkpointing, "remove_unused_columns": False}
    given |= {"use_cpu": not torch.cuda.is_available(), "output_dir": options.output_dir or "."}
    given |= {key: value for key, value in options.passed.items() if key not in _SEPARATE}
    if options.warmup_ratio:
        given["warmup_steps"] = options.warmup_ratio  # transformers takes a share below 1 for that
    known = {f.name for f in fields(kind)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**{key: value for key, value in given.items() if key in known}, **own)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise SFTError(f"training arguments: {error}") from error


_SEPARATE = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint")


def datasets_of(examples: list[Example], tokenizer: Any, options: Options) -> tuple[Any, Any]:
    """(dataset, counts) of examples, as the trainer of the file's stage takes them."""
    from datasets import Dataset

    if options.stage == "sft":
        rows, counts = encode_all(
            examples, tokenizer, options.cutoff_len, options.train_on_prompt, options.mask_history
        )
        if not rows:
            raise SFTError(f"cutoff_len {options.cutoff_len}: no example has an answer left. Give more tokens.")
        return Dataset.from_list(rows), counts
    return Dataset.from_list([_pair(example) for example in examples]), None


def _pair(example: Example) -> dict[str, Any]:
    *asked, chosen = example.messages
    return {"prompt": asked, "chosen": [chosen], "rejected": [{"role": "assistant", "content": example.rejected}]}
