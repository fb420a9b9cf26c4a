"""Whatever text a user gives as a path is looked up, or is one clear error; files that we write are whole or not there."""

import os
import stat
from pathlib import Path

import pytest

from ktransformers import load_rules, open_weights
from ktransformers.cli.conversation import read_prompt_file
from ktransformers.cli.profile import read_prompts
from ktransformers.configs import model_path, read_config
from ktransformers.engine.load import read_config_and_tokenizer
from ktransformers.errors import KTransformersError, RuleError, WeightError
from ktransformers.paths import existing_path, write_whole
from ktransformers.planner.profile import RoutingProfile

READERS = {
    "weights": (open_weights, WeightError),
    "rule file": (load_rules, RuleError),
    "model": (read_config_and_tokenizer, KTransformersError),
    "prompt file": (read_prompt_file, KTransformersError),
    "--prompts": (lambda text: read_prompts(Path(text)), KTransformersError),
    "routing profile": (RoutingProfile.read, KTransformersError),
}


@pytest.mark.parametrize("text", ["~nobody-has-this-name/x", "a\0b", "x" * 5000])
@pytest.mark.parametrize("subject", READERS)
def test_what_no_file_can_be_called(subject, text):
    read, kind = READERS[subject]
    with pytest.raises(kind, match=f"{subject} '.*': cannot be looked up: .*[^.]. Check the path.$") as error:
        read(text)
    assert len(str(error.value)) < 250
    assert model_path(text) is None
    with pytest.raises(KTransformersError):
        read_config(text)


@pytest.mark.parametrize("subject", READERS)
def test_what_is_not_there(subject, tmp_path):
    with pytest.raises(READERS[subject][1], match="gone"):
        READERS[subject][0](str(tmp_path / "gone" / "x"))


def test_a_path_is_what_the_user_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").write_text("1")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert existing_path("~/x", "it") == tmp_path / "x" and existing_path(tmp_path, "it") == tmp_path
    assert existing_path("~/x/y", "it") is None and existing_path("~/y", "it") is None
    with pytest.raises(WeightError, match="it '~/round': cannot be looked up: .*levels of symbolic links"):
        existing_path("~/round", "it", WeightError)


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "newer")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x"]
    write_whole(Path(os.devnull), "anything")
