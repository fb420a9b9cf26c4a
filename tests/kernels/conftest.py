"""Kernels compiled in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ktransformers.kernels import compiler


@pytest.fixture(scope="session")
def compiled_rows(tmp_path_factory):
    """Call with a program of tests/bench: the rows of its few cases. Skips where Triton is not there."""

    def rows(program):
        if compiler.triton is None:
            pytest.skip("Triton is not installed")
        file = tmp_path_factory.mktemp("kernels") / "rows.json"
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", program, "--quick", "--json", str(file)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())

    return rows
