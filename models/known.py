"""Known models by name: what `kt plan deepseek-v3` plans without a download.

`configs/*.json` hold what each publisher's config.json says about sizes, context, dtype and quantization, under the
publisher's own keys; what transformers has as its default may be missing. They are no substitute for the checkpoint's
config.json when a model is run: token ids and the like may differ between a publisher's releases.
"""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ktransformers.errors import KTransformersError, did_you_mean


@dataclass(frozen=True)
class Known:
    """One known model.

    Attributes:
        name: what users type.
        file: its config in `configs/`.
        parameters: of the whole model, as the publisher rounds it.
        active: parameters that one token meets, as the publisher rounds it.
        source: publisher and repository that the config and both numbers come from; a name that users may type too.
        aliases: further names, without a publisher: other releases with the same config.
    """

    name: str
    file: str
    parameters: int
    active: int
    source: str
    aliases: tuple[str, ...] = ()


def _known(name: str, billions: float, active: float, source: str, *aliases: str, file: str = "") -> Known:
    parameters, met = (round(number * 1e9) for number in (billions, active))
    return Known(name, file or f"{name}.json", parameters, met, source, aliases)


_V3_RELEASES = ("deepseek-v3-base", "deepseek-v3-0324", "deepseek-v3.1", "deepseek-v3.1-base", "deepseek-v3.1-terminus")
_SCOUT_NAMES = ("llama-4-scout-17b-16e", "llama4-scout")
_MAVERICK_NAMES = ("llama-4-maverick-17b-128e", "llama4-maverick")

KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        _known("deepseek-v2", 236, 21, "deepseek-ai/DeepSeek-V2", "deepseek-v2-chat", "deepseek-v2-chat-0628"),
        _known("deepseek-v2-lite", 15.7, 2.4, "deepseek-ai/DeepSeek-V2-Lite", "deepseek-v2-lite-chat"),
        _known("deepseek-v3", 671, 37, "deepseek-ai/DeepSeek-V3", *_V3_RELEASES),
        _known("deepseek-r1", 671, 37, "deepseek-ai/DeepSeek-R1", "deepseek-r1-0528", file="deepseek-v3.json"),
        _known("deepseek-v3.2", 671, 37, "deepseek-ai/DeepSeek-V3.2", "deepseek-v3.2-exp"),
        _known("deepseek-v4-flash", 284, 13, "deepseek-ai/DeepSeek-V4-Flash"),
        _known("moonlight-16b-a3b", 16, 3, "moonshotai/Moonlight-16B-A3B", "moonlight", "moonlight-16b-a3b-instruct"),
        _known("kimi-k2", 1040, 32.6, "moonshotai/Kimi-K2-Instruct", "kimi-k2-base"),
        _known("kimi-k2-0905", 1040, 32.6, "moonshotai/Kimi-K2-Instruct-0905"),
        _known("kimi-k2-thinking", 1040, 32.6, "moonshotai/Kimi-K2-Thinking"),
        _known("kimi-k2.5", 1040, 32.6, "moonshotai/Kimi-K2.5", file="kimi-k2-thinking.json"),
        _known("qwen2-57b-a14b", 57.4, 14, "Qwen/Qwen2-57B-A14B", "qwen2-57b", "qwen2-57b-a14b-instruct"),
        _known("qwen3-30b-a3b", 30.5, 3.3, "Qwen/Qwen3-30B-A3B"),
        _known("qwen3-235b-a22b", 235, 22, "Qwen/Qwen3-235B-A22B"),
        _known("qwen3-next-80b-a3b", 80, 3, "Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3-next-80b-a3b-thinking"),
        _known("qwen3-coder-30b-a3b", 30.5, 3.3, "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        _known("qwen3-coder-480b-a35b", 480, 35, "Qwen/Qwen3-Coder-480B-A35B-Instruct", "qwen3-coder"),
        _known("qwen3-coder-next", 80, 3, "Qwen/Qwen3-Coder-Next", file="qwen3-next-80b-a3b.json"),
        _known("qwen3.5-397b-a17b", 397, 17, "Qwen/Qwen3.5-397B-A17B", "qwen3.5-397b"),
        _known("glm-4.5", 355, 32, "zai-org/GLM-4.5", "glm-4.5-base"),
        _known("glm-4.5-air", 106, 12, "zai-org/GLM-4.5-Air", "glm-4.5-air-base"),
        _known("glm-4.6", 355, 32, "zai-org/GLM-4.6"),
        _known("glm-4.7", 355, 32, "zai-org/GLM-4.7", file="glm-4.6.json"),
        _known("glm-5", 744, 40, "zai-org/GLM-5"),
        _known("glm-5.1", 744, 40, "zai-org/GLM-5.1", file="glm-5.json"),
        _known("minimax-m2", 230, 10, "MiniMaxAI/MiniMax-M2"),
        _known("minimax-m2.1", 230, 10, "MiniMaxAI/MiniMax-M2.1", file="minimax-m2.json"),
        _known("minimax-m2.5", 230, 10, "MiniMaxAI/MiniMax-M2.5", file="minimax-m2.json"),
        _known("mixtral-8x7b", 46.7, 12.9, "mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b-instruct-v0.1"),
        _known("mixtral-8x22b", 141, 39, "mistralai/Mixtral-8x22B-v0.1"),
        _known("gpt-oss-20b", 20.9, 3.6, "openai/gpt-oss-20b"),
        _known("gpt-oss-120b", 116.8, 5.1, "openai/gpt-oss-120b"),
        _known("llama-4-scout", 109, 17, "meta-llama/Llama-4-Scout-17B-16E-Instruct", *_SCOUT_NAMES),
        _known("llama-4-maverick", 400, 17, "meta-llama/Llama-4-Maverick-17B-128E-Instruct", *_MAVERICK_NAMES),
    )
}
"""Name -> model. The checkpoints' formats: DeepSeek-V3, R1, V3.2, Kimi-K2-Instruct and MiniMax-M2 in FP8 with one scale
per 128x128 block; the routed experts of Kimi-K2-Thinking and K2.5 in INT4 with one scale per 32 (compressed-tensors),
of DeepSeek-V4-Flash and gpt-oss in MXFP4; the others in BF16. Llama 4, Kimi-K2.5 and Qwen3.5 are their text models
here; Llama 4's number of parameters includes the vision tower. A release with the sizes of another shares its file."""


def known_names() -> list[str]:
    """The names of the known models, without aliases."""
    return list(KNOWN)


def find_known(name: str) -> Known | None:
    """The model that `name` means: its name, an alias or its repository, in any case, with or without the publisher.

    A foreign publisher's copy is not meant: it may be stored in another format.
    """
    return _by_name().get(name.strip().lower())


def did_you_mean_known(name: str) -> str:
    """``" (did you mean 'deepseek-v3'?)"`` for the closest of all accepted names, or ``""``."""
    return did_you_mean(name.strip().lower(), _by_name())


def known_config(name: str) -> Any:
    """The transformers config of a known model.

    Raises:
        KTransformersError: no known model of that name.
    """
    known = find_known(name)
    if known is None:
        raise KTransformersError(
            f"{name}: no known model{did_you_mean_known(name)}. Known: {', '.join(known_names())}. Give one of these."
        )
    from ktransformers.models import register_families
    from transformers import AutoConfig

    register_families()
    fields = json.loads(resources.files("ktransformers.models").joinpath("configs", known.file).read_text("utf-8"))
    return AutoConfig.for_model(**fields, name_or_path=known.source)


def _by_name() -> dict[str, Known]:
    """Every accepted name, in lower case -> model."""
    names = {}
    for known in KNOWN.values():
        publisher, _, repository = known.source.lower().partition("/")
        for name in (known.name, repository, *known.aliases):
            names[name] = names[f"{publisher}/{name}"] = known
    return names
