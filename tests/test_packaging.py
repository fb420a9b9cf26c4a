"""A wheel made from the sdist, and a plain checkout, find the rules, the models and the C library."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

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
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.o", "*.a", ".pytest_cache"
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
