"""Every KT_* environment variable, typed, in one place. A bad value is an error, never a silent default.

Values are read when asked for, not at import, so tests and notebooks can change them.
"""

import os
import pkgutil
import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec

from ktransformers.errors import KTransformersError, did_you_mean

ISAS = ("portable", "avx2", "avx_vnni", "amx_emulated", "avx512", "avx512_vnni", "avx512_vbmi",
        "avx512_bf16", "amx", "neon_dotprod", "neon_i8mm")  # fmt: skip
"""Instruction sets of the C library, lowest first, as native/src/isas.h lists them (a test holds the two together: this
module works where the library is not built). KT_ISA may lower the detected one.

amx_emulated computes AMX's instructions in C: slow, for tests where AMX is missing, never chosen by itself."""

VARIABLES = {
    "KT_API_KEYS": "API keys that kt serve takes, with commas between them; never printed",
    "KT_BUILD": "read by `make setup`: host compiles the C library for this machine, all for every machine of its kind",
    "KT_CACHE_DIR": "folder of the prefix cache on disk; default: in the user's cache folder",
    "KT_DEBUG": "0 quiet, 1 print the injection plan while loading",
    "KT_GRAPHS": "1 (default) decodes on a GPU by a captured graph where the model allows it, 0 never",
    "KT_HISTORY": "file that keeps what was typed in kt chat, or off; default: in the user's state folder",
    "KT_HUGE_PAGES": "1 reads checkpoints into huge pages instead of mapping them: faster decoding, slower to open",
    "KT_ISA": f"highest instruction set the C library may use: {', '.join(ISAS)}",
    "KT_KERNELS": "1 (default) has Triton compute packed weights and attention on a GPU, 0 dense weights and torch",
    "KT_NUMA": "CPUs of each NUMA node, such as 0-3,8;4-7; default: what the system reports",
    "KT_PIN": "0 leaves the C library's threads to the system, 1 (default) binds them to cores and NUMA nodes",
    "KT_RULE_MODULES": "comma-separated modules that rule files may import beyond torch, transformers, ktransformers",
    "KT_THREADS": "threads of the C library, the calling one included; default: the cores this process may use",
}


SECRET = ("KT_API_KEYS",)
"""Whose values nothing prints."""


def _integer(name: str, default: int | None, low: int, high: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise KTransformersError(
            f"{name}={text!r}: expected a whole number from {low} to {high} ({VARIABLES[name]}). "
            f"Unset {name} or correct it."
        )
    return int(text)


def api_keys() -> str:
    """KT_API_KEYS as it is."""
    return os.environ.get("KT_API_KEYS", "")


def build() -> str | None:
    """KT_BUILD, or None where setup.py, which is what reads it, chooses."""
    value = os.environ.get("KT_BUILD", "").strip()
    if value and value not in ("host", "all", "sources"):
        raise KTransformersError(f"KT_BUILD={value!r}: expected host, all or sources. Unset KT_BUILD or correct it.")
    return value or None


def cache_dir() -> str:
    """KT_CACHE_DIR: the folder of the prefix cache on disk."""
    given = os.environ.get("KT_CACHE_DIR", "").strip()
    if given:
        return os.path.expanduser(given)
    return os.path.join(_user_folder("XDG_CACHE_HOME", ".cache"), "ktransformers", "blocks")


def debug() -> int:
    """KT_DEBUG as an integer, 0 when unset."""
    return _integer("KT_DEBUG", 0, 0, 1)


def kernels() -> bool:
    """KT_KERNELS: whether the GPU kernels of packed weights are used."""
    return bool(_integer("KT_KERNELS", 1, 0, 1))


def graphs() -> bool:
    """KT_GRAPHS: whether decoding on a GPU is captured as a graph."""
    return bool(_integer("KT_GRAPHS", 1, 0, 1))


def history() -> str:
    """KT_HISTORY: the path of the file that keeps what was typed in the chat program, or "off"."""
    given = os.environ.get("KT_HISTORY", "").strip()
    if given:
        return "off" if given.lower() in ("off", "0") else os.path.expanduser(given)
    state = _user_folder("XDG_STATE_HOME", os.path.join(".local", "state"))
    return os.path.join(state, "ktransformers", "chat_history")


def _user_folder(variable: str, default: str) -> str:
    """A folder of the XDG base directory specification, which ignores relative paths; `default`: below the user's."""
    given = os.environ.get(variable, "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), default)


def threads() -> int | None:
    """KT_THREADS, or None for the default of the C library."""
    return _integer("KT_THREADS", None, 1, 1024)


def huge_pages() -> bool:
    """KT_HUGE_PAGES: whether checkpoints are read into huge pages instead of being mapped."""
    return bool(_integer("KT_HUGE_PAGES", 0, 0, 1))


def pin() -> bool:
    """KT_PIN: whether the C library binds its threads to cores and NUMA nodes."""
    return bool(_integer("KT_PIN", 1, 0, 1))


def numa() -> str | None:
    """KT_NUMA, or None for the NUMA nodes that the system reports."""
    text = "".join(os.environ.get("KT_NUMA", "").split())
    if text and not re.fullmatch(r"{0}(,{0})*(;{0}(,{0})*)*".format(r"\d{1,4}(-\d{1,4})?"), text):
        raise KTransformersError(
            f"KT_NUMA={text!r}: expected lists of CPUs, one a node, such as 0-3,8;4-7. Unset KT_NUMA or correct it."
        )
    return text or None


def isa() -> str | None:
    """KT_ISA, or None for the widest instruction set that this machine has."""
    name = os.environ.get("KT_ISA", "").strip().lower()
    if not name:
        return None
    if name not in ISAS:
        raise KTransformersError(
            f"KT_ISA={name!r}: unknown instruction set{did_you_mean(name, ISAS)}. Known: {', '.join(ISAS)}."
        )
    return name


def rule_modules() -> tuple[str, ...]:
    """KT_RULE_MODULES as a tuple of module names, empty when unset."""
    return tuple(name.strip() for name in os.environ.get("KT_RULE_MODULES", "").split(",") if name.strip())


def rule_modules_problem(folder: str | os.PathLike | None = None) -> str:
    """What to do about modules of KT_RULE_MODULES that nothing can import; "" where all are there.

    They are looked for where Python looks, in the current folder and in that of a rule file, `folder`. Only the first
    part of a dotted name: to look for the rest would run it.
    """
    folders = list(dict.fromkeys(os.path.abspath(path) for path in (folder, os.curdir) if path is not None))
    absent = []
    for name in rule_modules():
        root = name.partition(".")[0]
        if root not in sys.modules and not (root and (find_spec(root) or PathFinder.find_spec(root, folders))):
            absent.append(f"{name!r}{did_you_mean(root, [info.name for info in pkgutil.iter_modules(folders)])}")
    if not absent:
        return ""
    step = "Install it, correct the name" if len(absent) == 1 else "Install them, correct the names"
    beside = "" if folder else ", start in its folder" if len(absent) == 1 else ", start in their folder"
    return (
        f"KT_RULE_MODULES: {', '.join(absent)} cannot be imported (looked in {', '.join(folders)} too). "
        f"{step}{beside}, or unset KT_RULE_MODULES."
    )
