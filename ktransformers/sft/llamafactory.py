"""LLaMA-Factory as it is published, on our operators: `python -m ktransformers.sft.llamafactory train FILE.yaml`.

It takes the arguments of `llamafactory-cli` and hands them on, after a few functions of LLaMA-Factory are replaced that
know upstream's distributions or older packages alone. Under `use_kt`, which USE_KT=0 or `use_kt: false` turns off, the
model is loaded by `KTConfig`, and `lora_target: all` is what it is in `kt sft`: every linear layer and the experts.
"""

import logging
import os
import sys
from dataclasses import field, make_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import MethodType, ModuleType
from typing import Any

from ktransformers.errors import KTransformersError, UnsupportedError
from ktransformers.sft.options import UNUSED, Options

TESTED = "0.9.5"
UPSTREAM = ("kt-kernel", "transformers-kt", "accelerate-kt")
"""Distributions that it demands for `use_kt`."""

_IDLE = ("chunk_size", "mode", *(key for key in UNUSED if key.startswith("kt_")))
KEYS = ("kt_optimize_rule", "cpu_infer", *_IDLE)
"""What published files say and this version does not know."""
IDLE = (*_IDLE, "trust_remote_code", "kt_expert_checkpoint_path", "kt_use_lora_experts", "kt_lora_expert_num",
        "kt_lora_expert_intermediate_size")  # fmt: skip
"""What changes nothing here, which is said."""


def main() -> None:
    """`llamafactory-cli` on our operators."""
    try:
        prepare()
        from llamafactory.cli import main as theirs

        theirs()
    except KTransformersError as error:
        sys.exit(f"error: {error}")


def prepare() -> None:
    """Import LLaMA-Factory and replace what is to be replaced. Raises UnsupportedError for another version of it."""
    try:
        found = version("llamafactory")
    except PackageNotFoundError:
        found = "none"
    if found != TESTED:
        raise UnsupportedError(
            f"llamafactory: found {found}, expected {TESTED}. `make setup-llamafactory` makes an environment; in "
            f"one of your own: pip install --no-deps llamafactory=={TESTED} trl==0.24.0"
        )
    os.environ.setdefault("USE_KT", "1")  # also: one process, whatever the number of GPUs
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    _import_without_torchaudio()
    _take_arguments()
    _load_by_rules()
    _adapt_experts()
    _find_checkpointed_layers()


def _say(text: str) -> None:
    logging.getLogger("llamafactory.ktransformers").warning_rank0_once(text)  # theirs, on every logger


def _import_without_torchaudio() -> None:
    """It imports torchaudio for text too, and not every torch has one: an empty one, for this import."""
    from transformers.utils import is_torchaudio_available

    if is_torchaudio_available():
        return
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        import llamafactory.data.mm_plugin  # noqa: F401
    finally:
        del sys.modules["torchaudio"]


def _take_arguments() -> None:
    """Let its parser know the keys of published files, and ask for none of upstream's distributions."""
    from llamafactory.hparams import ModelArguments, TrainingArguments, parser
    from llamafactory.train import trainer_utils

    instead = {ModelArguments: _model_arguments(), TrainingArguments: _training_arguments()}
    for kinds in (parser._TRAIN_ARGS, parser._INFER_ARGS, parser._EVAL_ARGS):
        kinds[:] = [instead.get(kind, kind) for kind in kinds]
    trainer_utils.ModelArguments = instead[ModelArguments]  # copies those of the model for the reference

    def check_version(requirement: str, mandatory: bool = False, theirs: Any = parser.check_version) -> None:
        if requirement not in UPSTREAM:
            theirs(requirement, mandatory)

    def verify(given: Any, data: Any, tuning: Any, theirs: Any = parser._verify_model_args) -> None:
        theirs(given, data, tuning)
        if given.use_kt:
            _refuse(given, tuning)

    parser.check_version, parser._verify_model_args = check_version, verify


def _refuse(given: Any, tuning: Any) -> None:
    """Raise UnsupportedError for what packed weights cannot do, before any are loaded."""
    packed = {
        "finetuning_type": tuning.finetuning_type != "lora",
        "use_dora": tuning.use_dora, "pissa_init": tuning.pissa_init, "quantization_bit": given.quantization_bit,
        "resize_vocab": given.resize_vocab or given.add_tokens or given.add_special_tokens,
        "export_dir": given.export_dir,
    }  # fmt: skip
    if wrong := ", ".join(key for key, asked in packed.items() if asked):
        raise UnsupportedError(
            f"{wrong}: the weights stay packed as the checkpoint has them, and LoRA adapters are trained beside them. "
            "Leave it out, or say use_kt: false for transformers' own model."
        )


def _model_arguments() -> type:
    from llamafactory.extras.constants import EngineName
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.hparams import ModelArguments

    def settle(self: Any) -> None:
        if self.infer_backend == "ktransformers":
            self.infer_backend, self.use_kt = EngineName.HF, True
        if self.use_kt:
            for key in (key for key in IDLE if getattr(self, key)):
                _say(": ".join(filter(None, (f"{key} changes nothing here", UNUSED.get(key)))))
            self.trust_remote_code = False
        ModelArguments.__post_init__(self)

    ours = [("use_kt", bool, field(default=is_env_enabled("USE_KT")))]
    ours += [(key, str | None, field(default=None)) for key in KEYS]
    return make_dataclass("ModelArguments", ours, bases=(ModelArguments,), namespace={"__post_init__": settle})


def _training_arguments() -> type:
    from llamafactory.hparams import TrainingArguments
    from torch.accelerator import is_available

    def settle(self: Any) -> None:
        self.warmup_steps = self.warmup_steps or self.warmup_ratio  # below 1 it is a share, in transformers 5
        self.__class__ = TrainingArguments  # as which it is saved beside the adapter
        self.__post_init__()

    on_cpu = field(default=not is_available())  # without it, bf16 is refused where there is no GPU
    ours = [("use_cpu", bool, on_cpu), ("warmup_ratio", float, field(default=0.0))]
    return make_dataclass("TrainingArguments", ours, bases=(TrainingArguments,), namespace={"__post_init__": settle})


def _load_by_rules() -> None:
    """Give `from_pretrained` the rules: it gets what is put into `init_kwargs` while the config is prepared."""
    from llamafactory.model import loader

    def patch_config(config: Any, tokenizer: Any, given: Any, init_kwargs: dict, trains: bool,
                     theirs: Any = loader.patch_config) -> None:  # fmt: skip
        theirs(config, tokenizer, given, init_kwargs, trains)
        if given.use_kt:
            init_kwargs["quantization_config"] = _kt_config(config, given)

    def register_autoclass(config: Any, model: Any, tokenizer: Any, theirs: Any = loader.register_autoclass) -> None:
        if not _is_ours(model):  # it would mark transformers' own classes as the code of a model folder, to be saved
            theirs(config, model, tokenizer)

    loader.patch_config, loader.register_autoclass = patch_config, register_autoclass


def _is_ours(model: Any) -> bool:
    from ktransformers.operators.base_operator import BaseInjectedModule

    return any(isinstance(module, BaseInjectedModule) for module in model.modules())


def _kt_config(config: Any, given: Any) -> Any:
    from ktransformers import native
    from ktransformers.from_pretrained import KTConfig
    from ktransformers.models import DEFAULT_RULES
    from ktransformers.sft.rules import rule_of

    if given.cpu_infer:
        native.set_threads(min(int(given.cpu_infer), native.default_threads()))
    rule = rule_of(given.kt_optimize_rule or "", _say) or DEFAULT_RULES.get(config.model_type, "Default")
    return KTConfig(rule, given.kt_weight_path)


def _adapt_experts() -> None:
    """Have `lora_target: all` reach experts. LLaMA-Factory knows linear layers alone, by the names of their classes."""
    from llamafactory.model import adapter

    parameters: list[str] = []  # from the one function to the other, which it calls next

    def find_all(model: Any, freeze_vision_tower: bool, theirs: Any = adapter.find_all_linear_modules) -> list[str]:
        from ktransformers.sft.targets import lora_config

        if not _is_ours(model):
            return theirs(model, freeze_vision_tower)
        ours = lora_config(model, Options(lora_target="all"))
        parameters[:] = ours.target_parameters or ()
        return list(ours.target_modules)

    def get_peft_model(model: Any, config: Any, theirs: Any = adapter.get_peft_model) -> Any:
        from ktransformers.sft.targets import note_of, without_adapter

        if not parameters:
            return theirs(model, config)
        config.target_parameters = list(parameters)
        parameters.clear()
        adapted = theirs(model, config)
        if left := note_of(without_adapter(adapted)):
            _say(left)
        return adapted

    adapter.find_all_linear_modules, adapter.get_peft_model = find_all, get_peft_model


def _find_checkpointed_layers() -> None:
    """It looks for a layer as the owner of a bound method; transformers passes a function and the layer beside it."""
    from llamafactory.model.model_utils import checkpointing

    def bound(call: Any) -> Any:
        if isinstance(call, partial) and not hasattr(call.func, "__self__"):
            return partial(MethodType(call.func, call.args[0]), *call.args[1:], **call.keywords)
        return call

    def make(given: Any, theirs: Any = checkpointing.get_custom_gradient_checkpointing_func) -> Any:
        custom = theirs(given)
        return lambda call, *args, **kwargs: custom(bound(call), *args, **kwargs)

    checkpointing.get_custom_gradient_checkpointing_func = make


if __name__ == "__main__":
    main()
