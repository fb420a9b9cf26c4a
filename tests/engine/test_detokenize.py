"""Token ids to text as they come: the same text as at once, whole characters, special tokens only where wanted."""

import random

import pytest
from ktransformers.models import embedded_model
from transformers import AutoTokenizer

from ktransformers.engine.detokenize import Detokenizer, special_ids


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model(), local_files_only=True)


def test_pieces_are_the_text_and_whole_characters(tokenizer):
    text = "Rules, naïve 🙂🙃 日本語 and the rest."
    words = Detokenizer(tokenizer)
    pieces = [words.add(token) for token in tokenizer.encode(text)] + [words.rest()]
    assert "".join(pieces) == words.text == text
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces


def test_an_answer_that_ends_inside_a_character_ends_before_it(tokenizer):
    words = Detokenizer(tokenizer)
    for token in tokenizer.encode("ab🙂")[:-1]:
        words.add(token)
    words.rest()
    assert words.text == "ab"


def test_bytes_that_are_no_character_are_held_back_for_a_while_alone(tokenizer):
    broken = tokenizer.encode("🙂")[0]  # its first byte, again and again
    words = Detokenizer(tokenizer)
    pieces = [words.add(broken) for _ in range(100)]
    assert sum(map(len, pieces)) > 50
    assert words.add(tokenizer.encode("a")[0]).endswith("a")


def test_special_tokens_are_text_where_they_are_kept(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.eos_token_id]
    for keep, text in (((), "a"), ((ids[-2],), "a<|user|>"), (special_ids(tokenizer), "a<|user|><|end|>")):
        words = Detokenizer(tokenizer, keep)
        assert "".join(words.add(token) for token in ids) + words.rest() == text


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_goes_on_from_another_is_joined_to_it(tokenizer, seed):
    ids = tokenizer.encode("Say where it is 🙂, said the naïve rule; and say it again.")
    at = random.Random(seed).randrange(1, len(ids))
    if tokenizer.decode(ids[:at]).endswith("\ufffd"):
        at += 4
    words = Detokenizer(tokenizer, before=ids[:at])
    pieces = "".join(words.add(token) for token in ids[at:]) + words.rest()
    assert tokenizer.decode(ids[:at]) + pieces == tokenizer.decode(ids)
    assert words.ids == ids[at:]


def test_a_space_after_the_text_before_is_not_lost():
    """Tokenizers of sentencepiece drop a space at the beginning of what they decode."""

    class Pieces:
        all_special_ids = ()

        def decode(self, ids, skip_special_tokens):
            return "".join(ids).replace("▁", " ").removeprefix(" ")

    assert Detokenizer(Pieces()).add("▁is") == "is"
    assert Detokenizer(Pieces(), before=["▁it"]).add("▁is") == " is"
