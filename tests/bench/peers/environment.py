"""The environment of the peers: `.venv-peers` in the checkout, made on first use, and the reasons where a part fails.

kt-kernel comes as its wheel (`--no-deps`) and sees this environment's torch through a .pth file. llama.cpp is the source in
llama-cpp-python's sdist; of it only ggml is built (the model code plays no part in a layer of experts), once with
GGML_NATIVE and, when an instruction set below AVX-512 is asked for, once more for AVX2.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[3]
HOME = ROOT / ".venv-peers"
PYTHON = HOME / "bin" / "python"
LLAMA = "llama-cpp-python==0.3.36"
UPSTREAM = "kt-kernel==0.7.2"
BUILDS = {
    "native": ["-DGGML_NATIVE=ON"],
    "avx2": ["-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_AVX512=OFF"],
    "avx_vnni": [
        "-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_AVX512=OFF",
        "-DGGML_AVX_VNNI=ON",
    ],
}  # fmt: skip
"""ggml's options by the name of the instruction set; every other set takes the native build."""


class Failed(Exception):
    """A part cannot be made; the text says which step and where its log lies."""


def _run(step: str, command: list[str], log: pathlib.Path) -> None:
    with open(log, "ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        except OSError as error:
            raise Failed(f"{step}: {error}") from error
    if code:
        raise Failed(f"{step} ended with status {code}; see {log.relative_to(ROOT)}")


def _pip(step: str, arguments: list[str], log: pathlib.Path) -> None:
    _run(step, [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments], log)


def _base(log: pathlib.Path) -> None:
    if not PYTHON.exists():
        _run("python -m venv", [sys.executable, "-m", "venv", str(HOME)], log)
    inside = HOME / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "bench_peers.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _tool(name: str, log: pathlib.Path) -> str:
    """A build tool of the system, or PyPI's."""
    found = shutil.which(name)
    if not found:
        found = str(HOME / "bin" / name)
        if not os.path.exists(found):
            _pip(f"pip install {name}", ["install", "--quiet", name], log)
    return found


def upstream(log: pathlib.Path) -> None:
    if not (HOME / ".upstream").exists():
        _pip(f"pip install {UPSTREAM}", ["install", "--no-deps", "--force-reinstall", UPSTREAM], log)
        (HOME / ".upstream").write_text(UPSTREAM)


def source(log: pathlib.Path) -> pathlib.Path:
    """llama.cpp as the sdist has it."""
    folder = HOME / "src" / LLAMA.replace("-", "_").replace("==", "-")
    if not folder.exists():
        target = HOME / "src"
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(target), LLAMA]
        _pip(f"pip download {LLAMA}", command, log)
        archive = next(target.glob("llama_cpp_python-*.tar.gz"), None)
        if archive is None:
            raise Failed(f"pip download {LLAMA} left no sdist in {target.relative_to(ROOT)}")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()
    return folder / "vendor" / "llama.cpp"


def ggml_folder(isa: str) -> pathlib.Path:
    return HOME / f"ggml-{isa if isa in BUILDS else 'native'}" / "bin"


def ggml(isa: str, jobs: int, log: pathlib.Path) -> None:
    folder = ggml_folder(isa)
    if (folder / ".built").exists():
        return
    cmake, ninja = _tool("cmake", log), _tool("ninja", log)
    off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TOOLS", "TESTS", "EXAMPLES", "SERVER")]
    build = [cmake, "--build", str(folder.parent), "-j", str(jobs), "--target", "ggml"]
    _run(
        "cmake",
        [
            cmake, "-S", str(source(log)), "-B", str(folder.parent), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *off, *BUILDS[folder.parent.name[5:]],
        ],
        log,
    )  # fmt: skip
    _run("cmake --build", build, log)
    (folder / ".built").touch()


def prepare(peers: list[str], isa: str, jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    """Make what `peers` need; returns the reasons of those that cannot be made, by peer. A second call is quick."""
    HOME.mkdir(exist_ok=True)
    log, reasons = HOME / "build.log", {}
    steps: list[tuple[list[str], str, Callable[[], None]]] = [
        (["llama", "llama-repack"], f"ggml of {LLAMA}, about a minute", lambda: ggml(isa, jobs, log)),
        (["upstream"], f"{UPSTREAM}, 100 MB", lambda: upstream(log)),
    ]
    for names, what, step in steps:
        wanted = [name for name in names if name in peers]
        if not wanted:
            continue
        try:
            say(what)
            _base(log)
            step()
        except (Failed, OSError, tarfile.TarError) as error:
            reasons.update(dict.fromkeys(wanted, str(error)))
    return reasons


def package(requirement: str) -> None:
    """Install something else into the environment, once. Raises Failed."""
    HOME.mkdir(exist_ok=True)
    log = HOME / "build.log"
    _base(log)
    _pip(f"pip install {requirement}", ["install", "--quiet", requirement], log)


def python() -> str:
    """The interpreter of the peers."""
    return str(PYTHON)


def llama_python() -> str:
    """An interpreter that imports llama_cpp, whose library is built here on first use (ten minutes of CPU).

    Built for what this machine has, without AMX: ggml's own use of it crashed in a virtual machine whose AMX works.
    """
    log = HOME / "build.log"
    HOME.mkdir(exist_ok=True)
    _base(log)
    if not (HOME / ".llama").exists():
        flags = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
        options = BUILDS["native"]
        if "amx_tile" in flags:
            parts = ("AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VNNI", "AVX512_VBMI", "AVX512_BF16")
            options = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{part}=ON" for part in parts)]
        os.environ["CMAKE_ARGS"] = " ".join([*options, "-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF"])
        print(f"building {LLAMA} in {HOME.relative_to(ROOT)}: ten minutes of CPU, once", file=sys.stderr)
        _pip(f"pip install {LLAMA}", ["install", "--no-cache-dir", LLAMA], log)
        (HOME / ".llama").write_text(LLAMA)
    return str(PYTHON)
