"""Whatever a user names as the model is a config, or one clear error; nothing of it is run, and nobody is asked."""

import json
import shutil

import pytest
from ktransformers.models import embedded_model
from transformers import AutoConfig

from ktransformers.configs import meta_model, read_config, text_config
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from tests.tiny import tiny_config

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """A question on the terminal fails the test."""

    def asked(*_):
        pytest.fail("a question was asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)


def folder(tmp_path, **changes):
    """A model folder with TINY's config and changes."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
    return tmp_path


# --- what is read -----------------------------------------------------------------------------------------


def test_a_folder_its_config_and_a_path_with_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = AutoConfig.from_pretrained(folder(tmp_path), local_files_only=True).to_dict()
    for model in (str(tmp_path), tmp_path, tmp_path / "config.json", "~", "~/config.json"):
        config = read_config(model)
        assert config.to_dict() == expected and config.name_or_path == str(tmp_path)


def test_numbers_that_json_has_not(tmp_path):
    """transformers writes infinity as an object."""
    config = AutoConfig.for_model("nemotron_h", time_step_limit=(0.0, float("inf")))
    config.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert list(read_config(tmp_path).time_step_limit) == [0.0, float("inf")]


def test_a_json_file_of_any_name(tmp_path):
    folder(tmp_path).joinpath("config.json").rename(tmp_path / "mine.json")
    assert read_config(tmp_path / "mine.json").hidden_size == 64


def test_a_gguf():
    config = read_config(next(embedded_model().glob("*.gguf")))
    assert config.hidden_size == read_config(embedded_model()).hidden_size


def test_a_path_that_exists_comes_before_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("kimi-k2").hidden_size == 7168
    folder(tmp_path).joinpath("config.json").rename("kimi-k2")
    assert read_config("kimi-k2").hidden_size == 64


def test_where_the_config_was_saved_and_how_it_was_run_do_not_matter(tmp_path):
    how = {"_attn_implementation": "flash_attention_2", "attn_implementation": "nobody/kernels", "_name_or_path": "/gone"}
    config = read_config(folder(tmp_path, **how, _experts_implementation="nobody/experts"))
    assert config.name_or_path == str(tmp_path)
    assert meta_model(config).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0, "num_experts_per_tok": 0},
        {"num_experts_per_tok": None},
        {"num_key_value_heads": [2, 0]},
        {"shared_expert_intermediate_size": 0},
        {"num_hidden_layers": 10_000},
    ],
    ids=str,
)
def test_sizes_that_some_model_has_are_not_refused(changes, tmp_path):
    try:
        read_config(folder(tmp_path, **changes))
    except KTransformersError as error:  # transformers may still want another type
        assert "no model has these sizes" not in str(error), error


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("deepseek-v3.22", "did you mean 'deepseek-v3.2'"),
        ("unsloth/DeepSeek-V3", "did you mean 'deepseek-v3'"),
        ("", "Give a folder with config.json"),
        (" ", "Give a folder"),
        ("no\0name", "Give a folder"),
        ("~nobody-here/model", "Give a folder"),
        ("x" * 5000, "Give a folder"),
        ("/dev/null/x", "Give a folder"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_nothing_there(model, hint):
    with pytest.raises(KTransformersError, match="no such folder or file") as error:
        read_config(model)
    assert hint in str(error.value) and len(str(error.value)) < 1000


def test_a_mistyped_path_names_its_neighbour(tmp_path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(KTransformersError, match="did you mean 'my-model'"):
        read_config(tmp_path / "my-modle")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(KTransformersError, match="no readable config.json.*Give a Hugging Face model folder"):
        read_config(tmp_path)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(KTransformersError, match=r"no readable config.json.*Give .*b\.gguf"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"model_type": "qwen3_moe",', "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "cannot be read as JSON"),
        (b"[1, 2]", "found a list"),
        (b"null", "found a NoneType"),
        (b"{}", "model_type is missing"),
        (b'{"model_type": 3}', "model_type is 3"),
        (b'{"model_type": "qwen3_mo"}', "did you mean 'qwen3_moe'"),
        (b'{"model_type": "zzzzzz"}', "no model of type 'zzzzzz'"),
        (b"x" * (17 << 20), "too large for a config.json"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_file_that_is_no_config(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(KTransformersError, match=message) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_no_regular_file():
    with pytest.raises(KTransformersError, match="not a file"):
        read_config("/dev/null")


def test_a_damaged_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 40)
    with pytest.raises(WeightError):
        read_config(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to 10,000"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": float("nan")}, "hidden_size is nan"),
        ({"hidden_size": 1 << 40}, "hidden_size is"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1, expected a whole number from 0"),
        ({"num_experts": 0}, "num_experts is 0, expected a whole number from 1"),
        ({"num_experts": 1.5}, "num_experts is 1.5"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"num_experts_per_tok": 9}, "chooses 9 of 8 experts"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_key_value_heads": [2, -1]}, "num_key_value_heads is -1"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"text_config": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers is 0"),
        ({"hidden_size": 0, "num_experts": -1}, "hidden_size is 0.*num_experts is -1"),
    ],
    ids=str,
)
def test_absurd_sizes(changes, message, tmp_path):
    with pytest.raises(KTransformersError, match=f"no model has these sizes: .*{message}"):
        read_config(folder(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": "small"}, {"torch_dtype": "bf17"}, {"hidden_act": 3}], ids=str)
def test_what_transformers_refuses(changes, tmp_path):
    with pytest.raises(KTransformersError, match="not a valid qwen3_moe config") as error:
        read_config(folder(tmp_path, **changes))
    assert "\n" not in str(error.value)


# --- code in a model's repository --------------------------------------------------------------------------

AUTO_MAP = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}


def evil(tmp_path, **changes):
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    return folder(tmp_path, auto_map=AUTO_MAP, **changes)


def test_a_model_that_only_its_repository_knows(tmp_path):
    with pytest.raises(UnsupportedError, match="'evil'.*is not run.*trust_remote_code"):
        read_config(evil(tmp_path, model_type="evil"))
    assert not (tmp_path / "was_run").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(tmp_path):
    model = meta_model(read_config(evil(tmp_path)))
    assert type(model).__module__.startswith("transformers.")
    assert not (tmp_path / "was_run").exists()


# --- meta model -------------------------------------------------------------------------------------------


def test_the_meta_model_leaves_the_config_alone(tmp_path):
    config = read_config(folder(tmp_path))
    before = config.to_dict()
    model = meta_model(config)
    assert model.device.type == "meta" and config.to_dict() == before and model.config is not config


def test_a_model_with_other_towers():
    config = tiny_config("llama4")
    assert text_config(config).model_type == "llama4_text" and text_config(text_config(config)) is text_config(config)
    assert type(meta_model(config)).__name__ == "Llama4ForCausalLM"


def test_a_config_without_a_language_model():
    with pytest.raises(UnsupportedError, match="no model of type 'vit' that continues text"):
        meta_model(AutoConfig.for_model("vit"))


def test_numbers_that_contradict_each_other(tmp_path):
    config = read_config(folder(tmp_path, hidden_act="nope"))
    with pytest.raises(KTransformersError, match="cannot build qwen3_moe.*nope") as error:
        meta_model(config)
    assert str(tmp_path) in str(error.value)


def test_a_config_that_chooses_more_experts_than_there_are():
    """From elsewhere than a file, of which `read_config` says it: a .gguf, a program."""
    with pytest.raises(KTransformersError, match="chooses 9 of 8 experts"):
        meta_model(tiny_config("qwen3_moe", num_experts_per_tok=9))
    meta_model(tiny_config("jamba", num_experts=1, num_experts_per_tok=2))  # no layer has experts


def test_the_embedded_model_is_read_from_a_copy(tmp_path):
    shutil.copy(embedded_model() / "config.json", tmp_path)
    assert type(meta_model(read_config(tmp_path))) is type(meta_model(read_config(embedded_model())))
