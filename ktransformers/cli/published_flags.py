"""Flags of published command lines that no command has any more: each works, or gets one line that says what to do.

Published for `local_chat.py` (with python-fire, hence `--flag true`, `--flag=True` and `--noflag`), for the former
server, and for SGLang with KTransformers in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typer import BadParameter
from typer.core import TyperCommand

from ktransformers.cli.common import note

_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Flag:
    """A flag that is gone. `switch`: takes a boolean, or nothing; any other takes a value.

    `becomes`: the key of the option that takes its place, with its value. `instead`: what to do, for a notice.
    `refused`: the notice is an error, as going on would not be what was asked for.
    """

    switch: bool = False
    becomes: str = ""
    instead: str = ""
    refused: bool = False


_SERVER = Flag(instead="belongs to a server, and this is a conversation in a terminal. Leave it out", refused=True)
_SAMPLING = Flag(
    instead="is read from the model's generation_config.json; write it there, or use --greedy", refused=True
)
_RULES = Flag(instead="has no effect: rules say where experts are (kt plan writes a rule file). Leave it out")
_PLANNED = Flag(instead="has no effect: rules place layers on several GPUs (kt plan writes a rule file). Leave it out")
_FORMAT = Flag(instead="has no effect: the format is read from the weights. Leave it out")

FLAGS: Mapping[str, Flag] = {
    "model_path": Flag(becomes="model"),
    "gguf_path": Flag(becomes="weights"),
    "kt_weight_path": Flag(becomes="weights"),
    "optimize_config_path": Flag(becomes="rule"),
    "optimize_rule_path": Flag(becomes="rule"),
    "cpu_infer": Flag(becomes="threads"),
    "kt_cpuinfer": Flag(becomes="threads"),
    "force_think": Flag(switch=True, becomes="force_think"),
    "device": Flag(becomes="devices"),
    "use_cuda_graph": Flag(switch=True, instead="has no effect: GPUs use graphs unless KT_GRAPHS=0. Leave it out"),
    "cache_q4": Flag(instead="is not built. Leave it out, or use --cache q8_0", refused=True),
    "mode": Flag(instead="has no effect: long prompts need no mode, --chunk-size bounds their memory. Leave it out"),
    "tp": _PLANNED,
    "tensor_parallel_size": _PLANNED,
    "trust_remote_code": Flag(switch=True, instead="has no effect: code from model folders is not run. Leave it out"),
    "kt_method": _FORMAT,
    "kt_num_gpu_experts": _RULES,
    "kt_gpu_experts_ratio": _RULES,
    "kt_expert_placement_strategy": _RULES,
    "kt_max_deferred_experts_per_token": _RULES,
    "kt_gpu_prefill_token_threshold": _RULES,
    "kt_threadpool_count": Flag(instead="has no effect: NUMA nodes are found, or said by KT_NUMA. Leave it out"),
    **dict.fromkeys(("temperature", "top_p", "top_k"), _SAMPLING),
    **dict.fromkeys(
        ("host", "port", "web", "api_key", "architectures", "backend_type", "cache_lens", "max_batch_size",
         "model_name", "served_model_name", "page_size", "mem_fraction_static"), _SERVER,
    ),
}  # fmt: skip
"""Name with underscores -> what becomes of the flag."""


def translate(arguments: list[str], own: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Arguments that a command takes, and notices.

    `own` maps the keys of `becomes` to the command's options, "" for its argument; an option of its own that has the
    name of a published one is left alone. Raises BadParameter for what is refused.
    """
    done: list[str] = []
    notices: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*done, word, *rest], notices
        name, sign, value = word.partition("=")
        flag, negated = _find(name)
        if flag is None or name in own.values() and not flag.switch:
            done.append(word)
            continue
        if flag.refused:
            raise BadParameter(f"{name}: {flag.instead}.")
        if flag.switch:
            takes = not sign and rest and rest[0].lower() in _YES + _NO
            value = "" if negated else value if sign else rest.pop(0) if takes else "true"
            value = "true" if value.lower() in _YES else ""
        elif not sign:
            if not rest:
                raise BadParameter(f"{name}: expected a value after it.")
            value = rest.pop(0)
        if flag.instead:
            notices.append(f"{name} {flag.instead}")
        done += _replacement(name, flag, value, own, notices)
    return done, notices


def _find(name: str) -> tuple[Flag | None, bool]:
    """The flag of a word such as --use_cuda_graph, and whether the word negates it, as --nouse_cuda_graph does."""
    if not name.startswith("--"):
        return None, False
    key = name[2:].replace("-", "_")
    for prefix in ("no_", "no"):
        switch = FLAGS.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if switch is not None and switch.switch:
            return switch, True
    return FLAGS.get(key), False


def _replacement(name: str, flag: Flag, value: str, own: Mapping[str, str], notices: list[str]) -> list[str]:
    option = own.get(flag.becomes)
    if not flag.becomes or option is None or flag.switch and not value:
        return []
    if flag.switch:
        return [option]
    if flag.becomes == "devices":
        if value == "cuda":
            return []
        notices.append(f"{name} {value} is read as {option} cuda={value}: rules name the devices")
        value = f"cuda={value}"
    return [option, value] if option else [value]


def command_class(own: Mapping[str, str], base: type[TyperCommand] = TyperCommand) -> type[TyperCommand]:
    """A command that takes published flags too. For `own` see `translate`."""

    class PublishedFlags(base):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if not ctx.resilient_parsing:  # completion
                args, notices = translate(args, own)
                for text in notices:
                    note(text)
            return super().parse_args(ctx, args)

    return PublishedFlags
