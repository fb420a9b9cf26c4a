"""The rule file that a training file names."""

import re
from collections.abc import Callable
from pathlib import Path

from ktransformers.errors import SFTError
from ktransformers.rules.files import packaged_name

_PUBLISHED = re.compile(r"-sft(-|\.|$)|^(DeepSeek|Qwen|Kimi|Moonlight|GLM)", re.IGNORECASE)


def rule_of(name: str, notify: Callable[[str], None]) -> str:
    """A file, or the name of a packaged rule; "" leaves the choice to the model's family.

    Published training files name rule files of a folder that came with them (DeepSeek-V3-Chat-sft-amx.yaml). Where
    there is no such file, the packaged rules of the family take its place.
    """
    if not name or Path(name).exists():
        return name
    if packaged_name(name):
        return name
    if not _PUBLISHED.search(Path(name).name):
        raise SFTError(f"kt_optimize_rule: {name}: no such file, and no packaged rules of that name.")
    notify(f"kt_optimize_rule: {name} is not here; the packaged rules of the model's family take its place")
    return ""
