"""Packages, the instruction-set table, and the cffi module. Everything else about the project is in pyproject.toml."""

import os
import platform
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

CORE = ("portable", "formats", "matmul", "threads", "calls")
"""Folders of native/src that need no flags of their own, beside its top."""

BASE = [
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-g0",
]
"""-ffp-contract=off: portable C and every instruction set must round alike; kernels ask for FMA by name.
-g0: Python's own flags ask for debug information, which is most of the file and a good part of the time to build it."""

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISA_FLAGS = {  # by processor: native/src/<name>/*.c; dispatch.c says what each rung needs at run time
    "x86_64": {
        "avx2": AVX2,
        "avx_vnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_vbmi": [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mgfni"],
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
        "amx_emulated": AVX512,
    },
    "aarch64": {
        "neon_dotprod": ["-march=armv8.2-a+dotprod"],
        "neon_i8mm": ["-march=armv8.2-a+dotprod+i8mm+bf16"],
    },
}
INTRINSICS = {"x86_64": "immintrin.h", "aarch64": "arm_neon.h"}
ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def compiles(compiler: list[str], machine: str, flags: list[str]) -> bool:
    """Whether the C compiler knows these flags; without them the instruction set is left out, not an error."""
    text = f"#include <{INTRINSICS[machine]}>\n#ifndef __{machine}__\n#error 32 bit\n#endif\nint probe;\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(text, encoding="ascii")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def isas(machine: str, compiler: list[str] | None) -> dict[str, list[str]]:
    """The instruction sets to build for this processor, with their flags."""
    machine = ALIASES.get(machine.lower(), machine.lower())
    compiler = compiler or (sysconfig.get_config_var("CC") or "cc").split()
    return {name: flags for name, flags in ISA_FLAGS.get(machine, {}).items() if compiles(compiler, machine, flags)}


def libraries(machine: str = platform.machine(), compiler: list[str] | None = None) -> list[tuple[str, dict]]:
    """One static library an instruction set, each with its own flags; the core first, for the linker."""
    headers = sorted(glob("native/include/*.h") + glob("native/src/**/*.h", recursive=True))
    sets = isas(machine, compiler)
    have = [(f"KT_HAVE_{name.upper()}", "1") for name in sets]

    def library(sources: list[str], flags: list[str]) -> dict:
        # avx_vnni/*.c include avx2/*.c, avx512_vnni/*.c avx512/*.c and amx_emulated/*.c amx/*.c: they count as headers.
        included = [f"native/src/{name}/*.c" for name in ("avx2", "avx512", "amx")] if flags else []
        depends = headers + [source for pattern in included for source in glob(pattern)]
        return {
            "sources": sorted(sources),
            "cflags": [*BASE, *flags],
            "macros": have,
            "obj_deps": {"": depends},
        }

    core = glob("native/src/*.c") + [s for folder in CORE for s in glob(f"native/src/{folder}/*.c")]
    return [("kt_core", library(core, []))] + [
        (f"kt_{name}", library(glob(f"native/src/{name}/*.c"), flags)) for name, flags in sets.items()
    ]


if __name__ == "__main__":  # native/sanitize.py reads the table above without setuptools
    from setuptools import find_packages, setup
    from setuptools.command.build_clib import build_clib

    class BuildLibraries(build_clib):
        """All libraries at once, as many as there are cores: one after the other they take minutes."""

        def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda library: super(BuildLibraries, self).build_libraries([library]), libraries))

    setup(
        packages=[
            *find_packages(include=["ktransformers", "ktransformers.*"]),
            "ktransformers.optimize_rules",
            "ktransformers.models",
            *(f"ktransformers.models.{name}" for name in find_packages("models")),
        ],
        package_dir={"ktransformers.optimize_rules": "optimize_rules", "ktransformers.models": "models"},
        package_data={
            "ktransformers.optimize_rules": ["*.yaml", "README.md"],
            "ktransformers.models": ["configs/*", "embedded/*", "embedded/**/*"],
        },
        libraries=libraries(),
        cmdclass={"build_clib": BuildLibraries},
        cffi_modules=["native/cffi_build.py:ffibuilder"],
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        include_package_data=False,  # the lists above say it all; MANIFEST.in is for the sdist
        zip_safe=False,
    )
