"""The C library for 64-bit ARM: cross-compiled, and run in an emulator on processors with and without its instruction sets.

Needs Debian's `gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static`; without them these tests are skipped. QEMU
computes what the architecture says; that says nothing about speed.
"""

import os
import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
PACKAGES = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static"

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}: {PACKAGES}")
needs_emulator = pytest.mark.skipif(not EMULATOR, reason=f"no qemu-aarch64: {PACKAGES}")


def libraries(machine: str, compiler: str) -> dict[str, dict]:
    """What setup.py would build for this processor with this compiler, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return dict(runpy.run_path("setup.py")["libraries"](machine, [compiler]))


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """native/test/sanitize.c with the whole library, for ARM. A warning is an error."""
    folder = tmp_path_factory.mktemp("aarch64")
    jobs = [("native/test/sanitize.c", ["-std=gnu11", "-Wall", "-Wextra"], [])]
    for library in libraries("aarch64", COMPILER).values():
        jobs += [(source, library["cflags"], library["macros"]) for source in library["sources"]]

    def build(job: tuple[str, list[str], list[tuple[str, str]]]) -> Path:
        source, flags, macros = job
        out = folder / (source.replace("/", "_") + ".o")
        defines = [f"-D{name}={value}" for name, value in macros]
        command = [COMPILER, *flags, *defines, "-O2", "-Werror", "-c", source, "-o", str(out)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 0, f"{source}: {found.stderr}"
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, jobs))
    program = folder / "sanitize"
    subprocess.run([COMPILER, "-static", *objects, "-o", program, "-lpthread", "-lm"], check=True)
    return program


@needs_compiler
def test_builds_everything():
    """Debian's compiler knows the flags of every ARM instruction set, and gets no source of another processor's."""
    built = libraries("aarch64", COMPILER)
    assert list(built) == ["kt_core", "kt_neon_dotprod", "kt_neon_i8mm"]
    sources = [Path(s) for library in built.values() for s in library["sources"]]
    core = runpy.run_path(str(ROOT / "setup.py"))["CORE"]
    assert {s.parent.name for s in sources} == {"src", *core, "neon_dotprod", "neon_i8mm"}


@pytest.mark.parametrize(("machine", "other"), [("x86_64", "aarch64"), ("arm64", "x86_64"), ("riscv64", "x86_64")])
def test_only_for_its_own_processor(machine, other):
    """Nothing of one processor is built for another, whatever the compiler says; unknown ones get portable C."""
    flags = runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]
    built = libraries(machine, "cc")
    assert not {f"kt_{name}" for name in flags[other]} & set(built)
    if platform.machine() == "x86_64" and machine != "x86_64":
        assert list(built) == ["kt_core"]  # this compiler has no ARM intrinsics


@needs_compiler
@needs_emulator
@pytest.mark.parametrize(
    ("processor", "cases", "rungs"),
    [
        ("cortex-a53", "pool", "portable"),  # ARMv8.0
        ("neoverse-n1", "few", "portable neon_dotprod"),  # ARMv8.2
        ("max", "few", "portable neon_dotprod neon_i8mm"),
    ],
)
def test_every_format_on_every_rung(program, processor, cases, rungs):
    """Every rung gives portable C's results for every format, path and odd size; none is used where it would not run."""
    command = [EMULATOR, "-cpu", processor, str(program), cases]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert found.returncode == 0, f"{processor}: exit {found.returncode}\n{found.stderr[-3000:]}"
    assert found.stderr.strip() == f"all equal, on: {rungs}"


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_big_endian_is_refused():
    """Packed weights are little-endian; on another machine the library does not build, and says why."""
    flags = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__", "-fsyntax-only"]
    found = subprocess.run(["cc", *flags, "native/src/formats/traits.c"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "packed weights are little-endian" in found.stderr
