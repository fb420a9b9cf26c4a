"""A tokenizer that comes back from a GGUF file gives the tokens that the model's own tokenizer.json gives."""

import itertools
import json

import gguf
import pytest
from ktransformers.models import embedded_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from ktransformers import tokenizer_from_gguf
from ktransformers.errors import KTransformersError, UnsupportedError, WeightError
from ktransformers.gguf_files.pretokenizers import SPLITS
from ktransformers.gguf_files.tokenizer import add_tokenizer
from tests.loaders import small_files

TEXTS = [
    "", " ", "\n", "Hello world", " two  spaces   three", "it's we're DON'T I'LL 'tis", "CamelCase snake_case x+=1; // no",
    "1 22 333 4444 55555 3.14 1,000,000 ١٢٣", "a\n\nb\r\n\tc \n d\n", "naïve café ÀÉÎ ñandú Ελληνικά Русский", "中文漢字 日本語 カタカナ 한국어",
    "e\u0301 o\u0308 (combining)", "🙂🙂 👩‍👩‍👧 ☃", "<|user|>hi<|end|> there <tool> x<tool>y", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "mixed 中a1b2文 'S 've's \u00a0nbsp\u3000wide", "\x00\x7f\x1b", "ends with space ",
]  # fmt: skip
CORPUS = [*TEXTS, *(" ".join(pair) for pair in itertools.product(TEXTS, repeat=2))]


def byte_level(split):
    """A byte-level BPE tokenizer trained to split text by the patterns, two of its tokens added ones."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|end|>", "<|user|>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


class Writer(gguf.GGUFWriter):
    """A GGUF file without tensors; `whole` False leaves out tokenizer.json, as llama.cpp's files do."""

    whole = False

    def add_string(self, key, value):
        if self.whole or key != "tokenizer.huggingface.json":
            super().add_string(key, value)


def write(folder, tokenizer, whole=False, **config):
    """The tokenizer through `add_tokenizer` into a file."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    writer = Writer(folder / "t.gguf", "qwen3moe")
    writer.whole = whole
    add_tokenizer(writer, folder, small_files.config("qwen3_moe", vocab_size=tokenizer.get_vocab_size() + 3, **config))
    return finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(writer.filenames)) if hasattr(writer, "filenames") else writer.path


def same(found, expected):
    """Same ids and same texts, special and added tokens included."""
    for text in CORPUS[:200]:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == expected.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("name", sorted(set(SPLITS)))
def test_every_split_comes_back(name, tmp_path):
    """The file says the name, or another of the same patterns; tokens are those of the tokenizer that was written."""
    tokenizer = byte_level(SPLITS[name])
    path = write(tmp_path, tokenizer, eos_token_id=tokenizer.token_to_id("<|end|>"))
    stated = gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents()
    assert SPLITS[stated] == SPLITS[name]
    found = tokenizer_from_gguf(path)
    same(found, tokenizer)
    assert found.eos_token == "<|end|>" and found.bos_token is None
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|end|>"


def test_the_patterns_are_those_of_transformers():
    """Where transformers has a table of its own, it and ours agree."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert {name: SPLITS.get(name) for name in GGUF_PRE_TOKENIZER_SPLITS} == {
        name: (pattern,) for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    }


def test_gpt2_is_the_librarys_own():
    ours = pre_tokenizers.Split(Regex(SPLITS["gpt-2"][0]), "isolated")
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in CORPUS[:200]:
        assert [span for _, span in ours.pre_tokenize_str(text)] == [s for _, s in theirs.pre_tokenize_str(text)]


def test_the_embedded_file_holds_its_folders_tokenizer():
    folder = embedded_model()
    found, expected = tokenizer_from_gguf(next(folder.glob("*.gguf"))), AutoTokenizer.from_pretrained(folder)
    same(found, expected._tokenizer)
    assert found.chat_template == expected.chat_template and found.model_max_length == expected.model_max_length
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(found, name) == getattr(expected, name)
    messages = [{"role": "user", "content": "What is a rule file?"}]
    options = {"add_generation_prompt": True, "return_dict": False}
    assert found.apply_chat_template(messages, **options) == expected.apply_chat_template(messages, **options)
    for text in CORPUS[:200]:
        assert found(text)["input_ids"] == expected(text)["input_ids"]


def test_a_tokenizer_json_in_the_file_is_taken_whole(tmp_path):
    """Whatever it is: this one splits by a pattern that has no name."""
    tokenizer = byte_level([r"\p{L}+|.\s*"])
    path = write(tmp_path, tokenizer, whole=True)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "default"
    same(tokenizer_from_gguf(path), tokenizer)


# --- SentencePiece ------------------------------------------------------------------------------------------


def sentencepiece(prefix=True):
    """BPE over letters with bytes to fall back on, as Mixtral's tokenizer.json has it."""
    letters = sorted({c for text in TEXTS[:8] for c in text.replace(" ", "\u2581")} | {"\u2581"})
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "w"), ("o", "r"), ("l", "d"), ("\u2581w", "or"),
             ("\u2581wor", "ld"), ("\u2581", "\u2581"), ("i", "t"), ("H", "e"), ("He", "ll"), ("\u2581", "t"), ("e", "e"), ("\u2581t", "h")]  # fmt: skip
    pairs = [pair for pair in pairs if not set("".join(pair)) - set(letters)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *map("".join, pairs)]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer, tokens, pairs


def write_sentencepiece(path, prefix=True, **also):
    tokenizer, tokens, pairs = sentencepiece(prefix)
    rank = {"".join(pair): -float(i) for i, pair in enumerate(pairs)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([rank.get(token, -1000.0) for token in tokens])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if not prefix:
        writer.add_add_space_prefix(False)
    for key, value in also.items():
        getattr(writer, key)(value)
    finish(writer)
    return path, tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    path, tokenizer = write_sentencepiece(tmp_path / "t.gguf", prefix)
    found = tokenizer_from_gguf(path)
    same(found, tokenizer)
    assert found("hello world")["input_ids"][0] == 1 and found.bos_token == "<s>" and found.unk_token is None
    assert found("hello")["input_ids"].count(2) == 0


def test_bos_and_eos_as_the_file_says(tmp_path):
    path, _ = write_sentencepiece(tmp_path / "t.gguf", add_add_bos_token=False, add_add_eos_token=True)
    ids = tokenizer_from_gguf(path)("hello")["input_ids"]
    assert ids[0] != 1 and ids[-1] == 2


# --- what cannot be built -------------------------------------------------------------------------------------


def edited(tmp_path, **values):
    """A good byte-level file with some values replaced, or left out when None."""
    source = write(tmp_path / "good", byte_level(SPLITS["qwen2"]))
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(tmp_path / "bad.gguf", "qwen3moe")
    for key, field in reader.fields.items():
        short = key.rpartition(".")[2]
        if key.startswith("GGUF.") or key == "general.architecture" or short in values:
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for short, value in values.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            sub = gguf.GGUFValueType.get_type(value[0]) if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(f"tokenizer.ggml.{short}", value, kind, sub)
    finish(writer)
    return tmp_path / "bad.gguf"


BAD = [
    (dict(pre="qwen-2"), UnsupportedError, "'qwen-2', which this version does not know .*did you mean 'qwen2'.*tokenizer.json"),
    (dict(pre="default"), UnsupportedError, "does not say how text is split"),
    (dict(pre=None), UnsupportedError, "does not say how text is split"),
    (dict(model="t5"), UnsupportedError, "tokenizer.ggml.model is 't5'; built are 'gpt2', 'llama'"),
    (dict(model=None), WeightError, "has no tokenizer in it.*--model_path"),
    (dict(tokens=None), WeightError, "has no tokenizer in it"),
    (dict(model=7), WeightError, "tokenizer.ggml.model is 7, expected str"),
    (dict(merges=None), WeightError, "merges is missing"),
    (dict(merges=["a", "b c"]), WeightError, "merges has 'a', expected two tokens"),
    (dict(merges=["a zzzzz"]), WeightError, "merges has 'a zzzzz'"),
    (dict(token_type=[1, 1]), WeightError, "token_type has 2 entries"),
    (dict(tokens=[1, 2]), WeightError, "tokens is no list of str"),
    (dict(eos_token_id=1 << 30), WeightError, "eos_token_id is 1073741824, which no token has"),
    (dict(eos_token_id="x"), WeightError, "expected int"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "kind", "message"), BAD, ids=lambda v: json.dumps(v) if isinstance(v, dict) else "")
def test_what_cannot_be_built_is_one_error(values, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        tokenizer_from_gguf(edited(tmp_path, **values))


def test_a_file_that_is_no_gguf(tmp_path):
    with pytest.raises(WeightError, match="not a GGUF file"):
        tokenizer_from_gguf(embedded_model() / "model.safetensors")
    with pytest.raises(KTransformersError, match="no such file"):
        tokenizer_from_gguf(tmp_path / "none.gguf")
