"""A tokenizer as GGUF metadata, and back: `add_tokenizer` writes what `tokenizer_from_gguf` reads.

The file's own tokenizer.json (`tokenizer.huggingface.json`, which we write) is taken as it is. Files without one, such
as llama.cpp's, name a vocabulary and how text is split; from these the same tokenizer is built for byte-level BPE
("gpt2") and for SentencePiece's BPE ("llama"). What a name of a split means stands in pretokenizers.py. Nothing is
guessed: a tokenizer that cannot be built right is an error, as wrong tokens look like a bad model.
"""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktransformers.errors import UnsupportedError, WeightError, did_you_mean, is_whole
from ktransformers.gguf_files.pretokenizers import ADDS_BOS, NAMES, SPLITS, WHOLE_WORDS_FIRST
from ktransformers.loaders import open_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType
_SPACE = "\u2581"  # what SentencePiece writes for a space
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_INSTEAD = "Pass --model_path (or AutoTokenizer a folder) with the model's tokenizer.json"

_READ = (
    r"tokenizer\.ggml\.(model|pre|tokens|token_type|scores|merges|add_bos_token|add_eos_token|add_space_prefix)",
    r"tokenizer\.ggml\.(bos|eos|unknown|padding)_token_id",
    r"tokenizer\.chat_template(s|\..+)?",
)
_LEFT = {
    r"tokenizer\.ggml\.eo[tm]_token_id": "ends of a turn: config_from_gguf makes them ends of an answer",
    r"tokenizer\.ggml\.(seperator|cls|mask)_token_id": "of models that fill in or compare, not of causal ones",
    r"tokenizer\.ggml\.add_sep_token": "the same",
    r"tokenizer\.ggml\.token_type_count": "of BERT's sentence types",
    r"tokenizer\.ggml\.(fim_\w+|prefix|suffix|middle)_token_id": "prompts for filling in are written by hand",
    r"tokenizer\.rwkv\.world": "of a kind of tokenizer that is not built",
}
"""Keys that are left, and why that is right."""

_REFUSED = {"remove_extra_whitespaces": False, "precompiled_charsmap": None}
"""Keys of SentencePiece that change how text is cut, and the value with which they do not."""

# --- reading ----------------------------------------------------------------------------------------------


def tokenizer_from_gguf(path: str | Path) -> Any:
    """The transformers tokenizer that a GGUF file (or the first of a split set) describes, chat template included.

    Raises:
        UnsupportedError: a kind of tokenizer, or a way to split text, that this version does not know.
        WeightError: no tokenizer in the file, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    with open_weights(path) as files:
        if files.format != "gguf":
            raise WeightError(f"{path}: not a GGUF file, so there is no tokenizer in it. Give the path of a .gguf.")
        source = _Source(files.paths[0], files.metadata)
        backend = source.stored() or source.built()
        source.check_unread()
        special = {f"{name}_token": text for name in _SPECIAL if (text := source.special(name, backend)) is not None}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=source.templates(),
            model_max_length=source.get(f"{source.metadata.get('general.architecture')}.context_length", int),
            clean_up_tokenization_spaces=False,
            **special,
        )


class _Source:
    """A file's metadata, asked with checks: a header is hostile until they are made."""

    def __init__(self, path: Path, metadata: dict) -> None:
        self.path, self.metadata = path, metadata

    def fail(self, what: str) -> WeightError:
        return WeightError(f"{self.path}: {what}. Download it again. {_INSTEAD}.")

    def get(self, key: str, kind: type) -> Any:
        """The value of `key`, or None."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise self.fail(f"{key} is {value!r}, expected {kind.__name__}")
        return value

    def items(self, key: str, kinds: tuple[type, ...], count: int | None = None) -> list | None:
        """The array of `key`, every item of one of `kinds`, or None."""
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            return None
        values = list(values) if hasattr(values, "__len__") and not isinstance(values, str) else [None]
        if not all(isinstance(value, kinds) for value in values):
            raise self.fail(f"tokenizer.ggml.{key} is no list of {kinds[0].__name__}")
        if count is not None and len(values) != count:
            raise self.fail(f"tokenizer.ggml.{key} has {len(values)} entries for {count} tokens")
        return values

    def templates(self) -> str | dict[str, str] | None:
        """The chat template, or all of them by name where there are several."""
        default = self.get("tokenizer.chat_template", str)
        names = self.metadata.get("tokenizer.chat_templates")
        if names is None:
            return default
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise self.fail(f"tokenizer.chat_templates is {names!r}, expected names")
        found = {name: self.get(f"tokenizer.chat_template.{name}", str) for name in names} | {"default": default}
        return {name: text for name, text in found.items() if text is not None}

    def check_unread(self) -> None:
        """Warn of keys of the tokenizer that nobody knows. Raises UnsupportedError for what would cut text wrongly."""
        if "tokenizer.huggingface.json" in self.metadata:
            return  # it says everything
        for key, neutral in _REFUSED.items():
            value = self.metadata.get(f"tokenizer.ggml.{key}")
            if value is not None and value is not neutral and not (hasattr(value, "__len__") and not len(value)):
                raise UnsupportedError(f"{self.path}: tokenizer.ggml.{key} is not computed. {_INSTEAD}.")
        known = re.compile("|".join((*_READ, *_LEFT)))
        keys = [key for key in self.metadata if key.startswith("tokenizer.") and not known.fullmatch(key)]
        if unknown := [key for key in keys if key.removeprefix("tokenizer.ggml.") not in _REFUSED]:
            names = ", ".join(unknown)
            warnings.warn(f"{self.path.name}: not known and not used: {names}. {_INSTEAD}.", UserWarning, stacklevel=3)

    def special(self, name: str, backend: "Tokenizer") -> str | None:
        number = self.get(f"tokenizer.ggml.{_SPECIAL[name]}", int)
        text = backend.id_to_token(number) if number is not None and 0 <= number < 1 << 31 else None
        if number is not None and text is None:
            raise self.fail(f"tokenizer.ggml.{_SPECIAL[name]} is {number}, which no token has")
        return text

    def stored(self) -> "Tokenizer | None":
        """The tokenizer.json that the file holds, if any."""
        from tokenizers import Tokenizer

        text = self.get("tokenizer.huggingface.json", str)
        try:
            return Tokenizer.from_str(text) if text else None
        except Exception as error:  # the library raises plain Exception
            raise self.fail(f"tokenizer.huggingface.json cannot be read ({error})") from error

    def built(self) -> "Tokenizer":
        """A tokenizer from the vocabulary in llama.cpp's keys."""
        kind = self.get("tokenizer.ggml.model", str)
        tokens = self.items("tokens", (str,))
        if not kind or not tokens:
            raise WeightError(f"{self.path}: has no tokenizer in it. {_INSTEAD}.")
        if kind not in _BUILDERS:
            raise UnsupportedError(
                f"{self.path}: tokenizer.ggml.model is {kind!r}; built are {', '.join(map(repr, _BUILDERS))}. "
                f"{_INSTEAD}."
            )
        types = self.items("token_type", (int,), len(tokens)) or [_NORMAL] * len(tokens)
        backend = _BUILDERS[kind](self, tokens, types)
        _add_tokens(backend, tokens, types)
        pre = self.metadata.get("tokenizer.ggml.pre")
        self._add_template(backend, bos=kind == "llama" or pre in ADDS_BOS)
        return backend

    def _add_template(self, backend: "Tokenizer", bos: bool) -> None:
        """Put the tokens that every text begins and ends with; `bos` is what counts where the file is silent."""
        from tokenizers.processors import Sequence, TemplateProcessing

        stated = {name: self.get(f"tokenizer.ggml.add_{name}_token", bool) for name in ("bos", "eos")}
        wanted = {"bos": bos if stated["bos"] is None else stated["bos"], "eos": bool(stated["eos"])}
        used = {n: text for n, on in wanted.items() if on and (text := self.special(n, backend)) is not None}
        if used:
            one = " ".join([*([used["bos"]] if "bos" in used else []), "{}", *([used["eos"]] if "eos" in used else [])])
            template = TemplateProcessing(
                single=one.format("$A").split(" "),
                pair=[*one.format("$A").split(" "), *(f"{piece}:1" for piece in one.format("$B").split(" "))],
                special_tokens=[(text, backend.token_to_id(text)) for text in used.values()],
            )
            before = backend.post_processor
            backend.post_processor = Sequence([before, template]) if before is not None else template

    def merges(self, tokens: Iterable[str]) -> list[tuple[str, str]] | None:
        """The file's merges, each of two tokens there are; None without any."""
        texts = self.items("merges", (str,))
        if texts is None:
            return None
        known, merges = set(tokens), []
        for text in texts:
            cut = text.find(" ", 1)  # a space may be the first letter
            pair = (text[:cut], text[cut + 1 :])
            if cut < 0 or not known.issuperset((*pair, "".join(pair))):
                raise self.fail(f"tokenizer.ggml.merges has {text!r}, expected two tokens of the vocabulary")
            merges.append(pair)
        return merges


def _byte_level(source: _Source, tokens: list[str], types: list[int]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    name = source.get("tokenizer.ggml.pre", str)
    if name not in SPLITS:
        missing = "does not say how text is split (tokenizer.ggml.pre)"
        said = f"splits text by {name!r}, which this version does not know{did_you_mean(name or '', SPLITS)}"
        raise UnsupportedError(f"{source.path}: {missing if name in (None, 'default') else said}. {_INSTEAD}.")
    merges = source.merges(tokens)
    if merges is None:
        raise source.fail("tokenizer.ggml.merges is missing")
    vocabulary = {text: number for number, text in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in WHOLE_WORDS_FIRST))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _sentencepiece(source: _Source, tokens: list[str], types: list[int]) -> "Tokenizer":
    """SentencePiece's BPE: a pair joins when its text is a token, the token of the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {text: number for number, text in enumerate(tokens)}
    merges = source.merges(tokens)
    if merges is None:
        scores = source.items("scores", (float, int), len(tokens))
        if scores is None:
            raise source.fail("tokenizer.ggml.scores and tokenizer.ggml.merges are missing")
        plain = {text for text, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
        ranked = {t: score for t, score in zip(tokens, scores, strict=True) if t in plain}
        merges = generate_merges(vocabulary, ranked, skip_tokens=vocabulary.keys() - plain)
    unknown = source.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unknown = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = source.get("tokenizer.ggml.add_space_prefix", bool) is not False
    to_space = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_space]) if prefix else to_space
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_tokens(backend: "Tokenizer", tokens: list[str], types: list[int]) -> None:
    """Tokens that are never cut: control tokens are special, user-defined ones are words like any other."""
    from tokenizers import AddedToken

    kinds = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])


# --- writing ----------------------------------------------------------------------------------------------

_NO_TOKENIZER = "no tokenizer in the file: {}; llama.cpp needs one"
_END_KEYS = ("eos", "eot", "eom")  # all that GGUF has for ends


def add_tokenizer(writer, folder: Path, config) -> list[str]:
    """Write the tokenizer of a model folder. Returns what of it is not in the file, or not for llama.cpp, and why.

    tokenizer.json goes in whole, which is what KTransformers reads; byte-level BPE also in llama.cpp's keys.
    """
    source = folder / "tokenizer.json"
    if not source.is_file():
        return [_NO_TOKENIZER.format(f"no tokenizer.json in {folder}")]
    text = source.read_text("utf-8")
    described = json.loads(text)
    writer.add_string("tokenizer.huggingface.json", text)
    notices = _add_special(writer, folder, config)
    model = described.get("model", {})
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(described.get("pre_tokenizer")):
        return [*notices, _NO_TOKENIZER.format(f"{source} is not a byte-level BPE tokenizer")]
    tokens, kinds = _tokens(described, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])])
    return notices


def _tokens(described: dict, size: int) -> tuple[list[str], list[int]]:
    """Token texts and kinds by id; ids that the vocabulary leaves out, up to its stated size, are unused."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    vocabulary = [(text, i, _NORMAL) for text, i in described["model"]["vocab"].items()]
    added = described.get("added_tokens", [])
    vocabulary += [(t["content"], t["id"], _CONTROL if t.get("special") else _USER_DEFINED) for t in added]
    for text, i, kind in vocabulary:
        if not 0 <= i < size:
            raise WeightError(f"Token {text!r} has id {i}, the model's vocabulary has {size}. Check tokenizer.json.")
        tokens[i], kinds[i] = text, kind
    return tokens, kinds


def _pre_tokenizer(pre: dict) -> str:
    """llama.cpp's name for the split before BPE, or "default" where it has none."""
    steps = pre.get("pretokenizers", [pre])
    if any(step.get("add_prefix_space") for step in steps):
        return "default"
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    patterns += [r"\p{N}" for step in steps if step["type"] == "Digits" and step.get("individual_digits")]
    patterns += [SPLITS["gpt-2"][0] for step in steps if step["type"] == "ByteLevel" and step.get("use_regex", True)]
    known = all(step["type"] in ("Split", "Digits", "ByteLevel") for step in steps)
    return NAMES.get(tuple(patterns), "default") if known else "default"


def _add_special(writer, folder: Path, config) -> list[str]:
    """Special ids, whether they are put around texts, and the chat templates. Returns what has no key."""
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    for kind in ("bos", "pad"):
        for number in _ids(getattr(config, f"{kind}_token_id", None), config.vocab_size)[:1]:
            getattr(writer, f"add_{kind}_token_id")(number)
    ends = _ids(getattr(config, "eos_token_id", None), config.vocab_size)
    if (folder / "generation_config.json").is_file():
        generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
        ends += [n for n in _ids(generation.get("eos_token_id"), config.vocab_size) if n not in ends]
    for kind, number in zip(_END_KEYS, ends, strict=False):
        getattr(writer, f"add_{kind}_token_id")(number)
    for kind in ("bos", "eos"):
        if isinstance(settings.get(f"add_{kind}_token"), bool):
            getattr(writer, f"add_add_{kind}_token")(settings[f"add_{kind}_token"])
    if (templates := _templates(folder, settings)) is not None:
        writer.add_chat_template(templates)
    if not (left := ends[len(_END_KEYS) :]):
        return []
    return [f"end-of-sequence tokens {left} are not in the file: GGUF has keys for {len(_END_KEYS)} ends. Readers end "
            "an answer there only if they know the tokens by their text."]  # fmt: skip


def _ids(stated: Any, size: int) -> list[int]:
    """Token ids, one or several as configs state them, that the vocabulary has."""
    numbers = stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(n for n in numbers if is_whole(n, 0, size - 1)))


def _templates(folder: Path, settings: dict) -> str | list[dict[str, str]] | None:
    """A folder's chat template, or all of them with their names, wherever transformers keeps them."""
    found = settings.get("chat_template")
    named = {"default": found} if isinstance(found, str) else {}
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and {"name", "template"} <= one.keys():
            named[one["name"]] = one["template"]
    if (single := folder / "chat_template.jinja").is_file():
        named["default"] = single.read_text("utf-8")
    named |= {path.stem: path.read_text("utf-8") for path in folder.glob("additional_chat_templates/*.jinja")}
    if named.keys() <= {"default"}:
        return named.get("default")
    return [{"name": name, "template": text} for name, text in named.items()]
