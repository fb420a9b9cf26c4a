"""Packages, the instruction-set table, how the C library is compiled, the cffi module. All else is in pyproject.toml.

`python native/objects.py` and native/sanitize.py use the table and the compiler below without setuptools.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

CORE = ("portable", "formats", "matmul", "attention", "threads", "calls")
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
]
"""-ffp-contract=off: portable C and every instruction set must round alike; kernels ask for FMA by name."""

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
ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}

BUILDS = {
    "host": "what this machine can run",
    "all": "every instruction set that the compiler knows",
    "sources": "what this machine can run, without sets that are the sources of another with other flags",
}
"""What KT_BUILD may say. Unset: all for a wheel, which travels; host for a checkout, where it saves minutes."""
FLAGS_ALONE = {"avx_vnni", "avx512_vnni", "avx512_vbmi"}
"""Sets of files that include those of another."""
IN_A_CHECKOUT = {"build_clib", "build_ext", "editable_wheel", "develop"}
"""Commands of setuptools whose result stays on this machine."""

OBJECTS = Path("build", "clib")
SLOWEST = ("dot.c", "gemm.c", "iq_dot.c", "unpack.c")
"""Sources that take seconds, longest first: begun last, one of them would keep a single core busy at the end."""


def wanted_build(commands: list[str] | None = None) -> str:
    """One of BUILDS: what KT_BUILD says, or else what these commands of setuptools are for."""
    value = os.environ.get("KT_BUILD", "").strip()
    if value and value not in BUILDS:
        known = ", ".join(f"{name} ({meaning})" for name, meaning in BUILDS.items())
        sys.exit(f"error: KT_BUILD={value!r}: expected one of {known}. Unset KT_BUILD or correct it.")
    return value or ("host" if set(commands or ()) <= IN_A_CHECKOUT else "all")


def c_compiler() -> list[str]:
    """The command of the C compiler: CC, or else what Python was built with."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def macros(compiler: list[str], flags: list[str]) -> set[str]:
    """Names that the compiler predefines with these flags, among them one for each feature of a processor. Empty where
    it does not know a flag."""
    try:
        found = subprocess.run(
            [*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        sys.exit(f"error: no C compiler ({compiler[0]}). On Debian: apt-get install gcc libc6-dev, or set CC.")
    return {line.split()[1] for line in found.stdout.splitlines()} if found.returncode == 0 else set()


def isas(machine: str, compiler: list[str] | None = None, build: str = "all") -> dict[str, list[str]]:
    """The instruction sets to build for this processor, with their flags: those that the compiler knows, without an
    error for others, and of these for the host only what it runs. Where the compiler cannot tell what that is, all."""
    machine = ALIASES.get(machine.lower(), machine.lower())
    compiler = compiler or c_compiler()
    plain = macros(compiler, [])
    if f"__{machine}__" not in plain:
        return {}
    features = {name: macros(compiler, flags) - plain for name, flags in ISA_FLAGS.get(machine, {}).items()}
    known = {name: flags for name, flags in ISA_FLAGS.get(machine, {}).items() if features[name]}
    if build == "sources":
        known = {name: flags for name, flags in known.items() if name not in FLAGS_ALONE}
    host = set() if build == "all" else macros(compiler, ["-march=native"])
    return {name: flags for name, flags in known.items() if not host or features[name] <= host}


def libraries(
    machine: str = platform.machine(), compiler: list[str] | None = None, build: str = "all"
) -> list[tuple[str, dict]]:
    """One static library an instruction set, each with its own flags; the core first, for the linker."""
    headers = sorted(glob("native/include/*.h") + glob("native/src/**/*.h", recursive=True))
    sets = isas(machine, compiler, build)
    have = [(f"KT_HAVE_{name.upper()}", "1") for name in sets]

    def library(sources: list[str], flags: list[str]) -> dict:
        # avx_vnni/*.c include avx2/*.c, avx512_vnni/*.c avx512/*.c and amx_emulated/*.c amx/*.c: they count as headers.
        included = [f"native/src/{name}/*.c" for name in ("avx2", "avx512", "amx")] if flags else []
        depends = headers + [source for pattern in included for source in glob(pattern)]
        return {
            "sources": sorted(sources),
            "cflags": [*BASE, *flags],
            "macros": [] if flags else have,
            "obj_deps": {"": depends},
        }

    core = glob("native/src/*.c") + [s for folder in CORE for s in glob(f"native/src/{folder}/*.c")]
    return [("kt_core", library(core, []))] + [
        (f"kt_{name}", library(glob(f"native/src/{name}/*.c"), flags)) for name, flags in sets.items()
    ]


def processors() -> int:
    """How many compilers run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def object_of(folder: Path, command: list[str], source: str) -> Path:
    """Where the object of a source is kept: a place of its own for each command, so that new flags make a new one."""
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    return folder / digest / Path(source).with_suffix(".o")


def compile_one(folder: Path, source: str, library: dict, extra: list[str]) -> Path:
    """The object of one source, compiled unless it is newer than all it depends on. Raises CalledProcessError."""
    defines = [f"-D{name}={value}" for name, value in library["macros"]]
    command = [*c_compiler(), *library["cflags"], *defines, *extra]
    out = object_of(folder, command, source)
    depends = [source, *library["obj_deps"][""]]
    if not out.exists() or out.stat().st_mtime <= max(Path(path).stat().st_mtime for path in depends):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part.o")
        subprocess.run([*command, "-c", source, "-o", str(part)], check=True)
        part.replace(out)  # what was interrupted is not taken for an object
    return out


def compile_objects(
    parts: list[tuple[str, dict]], folder: Path = OBJECTS, extra: list[str] | None = None
) -> dict[str, list[Path]]:
    """The objects of each library, by its name. Raises CalledProcessError for the first that does not compile."""
    extra = shlex.split(os.environ.get("CFLAGS", "")) if extra is None else extra
    jobs = [(name, source, library) for name, library in parts for source in library["sources"]]
    rank = {name: place for place, name in enumerate(SLOWEST)}
    jobs.sort(key=lambda job: rank.get(Path(job[1]).name, len(rank)))
    objects: dict[str, list[Path]] = {name: [] for name, _ in parts}
    with ThreadPoolExecutor(processors()) as pool:
        running = [(name, pool.submit(compile_one, folder, source, library, extra)) for name, source, library in jobs]
        try:
            for name, job in running:
                objects[name].append(job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return objects


if __name__ == "__main__":
    from setuptools import find_packages, setup
    from setuptools.command.build_clib import build_clib

    class BuildLibraries(build_clib):
        """Static libraries from compile_objects, which keeps objects from one command to the next."""

        def finalize_options(self) -> None:
            self.distribution.libraries = libraries(build=wanted_build(self.distribution.commands))
            super().finalize_options()
            self.build_clib = str(OBJECTS)

        def build_libraries(self, libraries: list[tuple[str, dict]]) -> None:
            try:
                objects = compile_objects(libraries)
            except subprocess.CalledProcessError as error:
                sys.exit(error.returncode)  # the compiler has said why
            for name, _ in libraries:
                Path(self.compiler.library_filename(name, output_dir=self.build_clib)).unlink(missing_ok=True)
                self.compiler.create_static_lib([str(o) for o in objects[name]], name, output_dir=self.build_clib)
            self.distribution.get_command_obj("build_ext").force = True  # link, whatever changed

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
            "ktransformers.server": ["page/*", "page/**/*"],
            "ktransformers.models": ["configs/*", "embedded/*", "embedded/**/*"],
        },
        libraries=[("kt_core", {"sources": []})],  # BuildLibraries knows which, once the commands are known
        cmdclass={"build_clib": BuildLibraries},
        cffi_modules=["native/cffi_build.py:ffibuilder"],
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        include_package_data=False,  # the lists above say it all; MANIFEST.in is for the sdist
        zip_safe=False,
    )
