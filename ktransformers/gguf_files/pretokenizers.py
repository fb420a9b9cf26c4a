"""How byte-level BPE splits text into words, by the name that `tokenizer.ggml.pre` gives it.

The names are llama.cpp's, the patterns those of the models' own tokenizer.json: each is applied to the pieces that the
one before it left. Data only; tokenizer.py reads and writes them.
"""

_ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER_BUT_HAN, _LOWER_BUT_HAN = (f"{kind[:-1]}&&[^\\p{{Han}}]]" for kind in (_UPPER, _LOWER))
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_SIGN = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDING}"


def _cased(upper: str, lower: str, contraction: str, digits: str, sign: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{upper}*{lower}+{contraction}|{before}{upper}+{lower}*{contraction}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[{sign}]*|{_ENDING}"


_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _CJK,
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDING}",
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDING}"
)
_KIMI = r"[\p{Han}]+|" + _cased(_UPPER_BUT_HAN, _LOWER_BUT_HAN, f"{_CONTRACTION}?", "{1,3}", r"\r\n")
_CASED_LETTERS = (  # escaped where an editor that normalizes Unicode would change what is written
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴ"
    "ᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3Ꙁ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}",
)  # fmt: skip
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")

_BY_PATTERN: dict[tuple[str, ...], tuple[str, ...]] = {
    (_GPT2,): (
        "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "exaone4", "granite-docling", "mellum", "a.x-4.0",
        "gigachat", "modern-bert",
    ),
    (r"\p{N}", _GPT2): ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
    (_words("{1,3}"),): (
        "llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "falcon3", "falcon-h1",
        "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    ),
    (_words(""),): (
        "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "stablelm2", "grok-2", "solar-open",
    ),
    (_QWEN35,): ("qwen35",),
    _DEEPSEEK_V3: ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    _DEEPSEEK_LLM: ("deepseek-llm",),
    _DEEPSEEK_CODER: ("deepseek-coder",),
    (_cased(_UPPER, _LOWER, "", "", r"\r\n/"),): ("tekken",),
    (_cased(_UPPER, _LOWER, f"{_CONTRACTION}?", "{1,3}", r"\r\n/"),): (
        "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2",
    ),
    (_KIMI,): ("kimi-k2",),
    (_BAILING,): ("bailingmoe", "bailingmoe2", "llada-moe"),
}  # fmt: skip
"""Patterns -> llama.cpp's names for them, the one to write first. Left out are those that no pattern expresses, or
whose models are no causal language models."""

SPLITS: dict[str, tuple[str, ...]] = {name: patterns for patterns, names in _BY_PATTERN.items() for name in names}
"""Name -> patterns."""

NAMES: dict[tuple[str, ...], str] = {patterns: names[0] for patterns, names in _BY_PATTERN.items()}
"""Patterns -> name."""

WHOLE_WORDS_FIRST = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
"""Names whose models take a word that the vocabulary has as one token, whatever the merges say."""

ADDS_BOS = WHOLE_WORDS_FIRST
"""Names whose models start with the beginning-of-sequence token where the file says nothing about it."""
