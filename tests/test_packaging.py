"""A wheel made from the sdist, and a plain checkout, find the rules, the models and the C library. What setup.py compiles."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from ktransformers import native

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import ktransformers, ktransformers.native as native
from ktransformers.models import embedded_model, known
from ktransformers.rules.plan import load_rules, packaged_rules
assert ktransformers.__file__.startswith({where!r}), ktransformers.__file__
assert "DeepSeek-V3" in packaged_rules() and load_rules("DeepSeek-V3")
assert embedded_model().joinpath("config.json").is_file() and list(embedded_model().glob("*.gguf"))
assert known.known_config("deepseek-v3").num_hidden_layers == 61
assert native.available() and "portable" in native.isas()
"""


def probe(where, cwd):
    """Run the probe with `where` first on the path; installed copies elsewhere must not be found."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBE.format(where=str(where))], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(where)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def run(*command, cwd):
    ran = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files of this repository as a stranger gets them, without anything that was built."""
    copy = tmp_path_factory.mktemp("checkout") / "ktransformers"
    skip = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.o", "*.a", ".pytest_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skip)
    return copy


def test_a_wheel_built_from_the_sdist_is_complete(checkout, tmp_path):
    run("setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q")
    run("-m", "pip", "wheel", *options, "-w", str(tmp_path / "wheel"), str(source), cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    run("-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    assert not (tmp_path / "site" / "models").exists(), (
        "the folder names of the checkout must not become top-level packages"
    )
    probe(tmp_path / "site", cwd=tmp_path)


def test_a_plain_checkout_works_once_the_library_is_built_in_place(checkout):
    run("setup.py", "-q", "build_clib", "build_ext", "--inplace", cwd=checkout)
    probe(checkout, cwd=checkout)


# ---- what is compiled --------------------------------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py, which look for sources in the current folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("KT_BUILD", raising=False)
    return runpy.run_path("setup.py")


def test_a_checkout_is_compiled_for_this_machine_and_a_wheel_for_all(setup, monkeypatch):
    wanted = setup["wanted_build"]
    assert wanted() == "host"
    for commands in (["editable_wheel"], ["build_clib", "build_ext"], ["develop"]):
        assert wanted(commands) == "host", commands
    for commands in (["bdist_wheel"], ["build"], ["install"], ["bdist_wheel", "sdist"], ["build_clib", "bdist_wheel"]):
        assert wanted(commands) == "all", commands
    monkeypatch.setenv("KT_BUILD", "all")
    assert wanted(["editable_wheel"]) == "all"
    monkeypatch.setenv("KT_BUILD", "host")
    assert wanted(["bdist_wheel"]) == "host"


def test_a_bad_kt_build_is_one_clear_error(checkout):
    for program in (["native/objects.py"], ["setup.py", "-q", "build_clib"]):
        ran = subprocess.run(
            [sys.executable, *program], cwd=checkout, capture_output=True, text=True, env={**os.environ, "KT_BUILD": "fast"}
        )
        assert ran.returncode == 1 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
        assert "KT_BUILD='fast'" in ran.stderr and "host" in ran.stderr and "all" in ran.stderr


def test_everything_that_this_machine_runs_is_compiled_for_it(setup):
    """The compiler's view of the processor against the C library's own, from cpuid; the emulation of AMX for the tests."""
    machine = platform.machine()
    everything, host = setup["isas"](machine), setup["isas"](machine, build="host")
    assert list(host) == [name for name in everything if name in host], "the order of the table"
    features = native.cpu_features()
    runs = {name for name, needs in native.isa_needs().items() if needs and all(features[need] for need in needs)}
    assert runs & set(everything) <= set(host)
    assert ("amx_emulated" in host) == ("avx512" in host)
    assert set(native.isas()) - {"portable"} <= set(host)


def compiler(folder, lacks):
    """A C compiler that refuses flags which contain `lacks`."""
    script = folder / "some-cc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{lacks}*) echo "unknown flag" >&2; exit 1;; esac\nexec cc "$@"\n')
    script.chmod(0o755)
    return [str(script)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
def test_a_flag_that_the_compiler_does_not_know_leaves_out_its_instruction_sets(setup, tmp_path):
    everything = setup["isas"]("x86_64")
    lacking = setup["isas"]("x86_64", compiler(tmp_path, "-mavx512vnni"))
    assert set(everything) - set(lacking) == {"avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx"}
    blind = setup["isas"]("x86_64", compiler(tmp_path, "-march=native"), "host")
    assert blind == everything, "where the host is unknown everything is compiled"


def test_an_object_is_compiled_once_for_each_command(setup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, header = Path("part.c"), Path("part.h")
    source.write_text("int part(void) { return 1; }\n")
    header.write_text("")
    part = {"sources": [str(source)], "cflags": [], "macros": [], "obj_deps": {"": [str(header)]}}

    def objects(**changed):
        (found,) = setup["compile_objects"]([("part", {**part, **changed})], Path("build"), [])["part"]
        return found, found.stat().st_mtime_ns

    first = objects()
    assert objects() == first, "nothing has changed"
    other, _ = objects(macros=[("KT_HAVE_AVX2", "1")])
    assert other != first[0] and objects() == first, "each command keeps its own"
    late = time.time() + 10
    os.utime(header, (late, late))
    assert objects()[1] > first[1], "a header has changed"
    source.write_text("int part(void) { return }\n")
    with pytest.raises(subprocess.CalledProcessError):
        objects(cflags=["-w"])
    assert not list(tmp_path.glob("build/**/*.part.o"))
