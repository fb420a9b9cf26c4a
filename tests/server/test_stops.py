"""Stop strings in text that comes in pieces: never a part of one is passed on, whatever the pieces are."""

import random

import pytest

from ktransformers.server.stops import Stops


def whole(text, stops):
    """What is to be passed on, found at once: up to the stop string that is complete first, the longest of several."""
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return (text, None) if not ends else (text[: min(ends)[1]], min(ends)[2])


@pytest.mark.parametrize("seed", range(20))
def test_any_pieces_give_what_the_whole_text_gives(seed):
    chance = random.Random(seed)
    for _ in range(200):
        text = "".join(chance.choices("aab", k=chance.randrange(30)))
        texts = ["".join(chance.choices("ab", k=chance.randrange(1, 5))) for _ in range(chance.randrange(4))]
        stops, passed, at = Stops(texts), "", 0
        while at < len(text):
            size = chance.randrange(1, 4)
            passed += stops.add(text[at : at + size])
            if stops.found is None:  # what could still become a stop string is not passed on
                assert not any(text[:at + size].endswith(stop[:1]) and len(passed) == at + size for stop in texts if len(stop) > 1)
            at += size
        passed += stops.rest() if stops.found is None else ""
        assert (passed, stops.found) == whole_in_pieces(text, texts), (text, texts)


def whole_in_pieces(text, stops):
    return whole(text, stops) if stops else (text, None)


def test_nothing_follows_a_stop_string():
    stops = Stops(["END"])
    assert [stops.add(piece) for piece in ("a E", "N", "D b", "c")] == ["a ", "", "", ""]
    assert stops.found == "END" and stops.rest() == ""


def test_what_only_looked_like_one_is_passed_on():
    stops = Stops(["</s>", "\n\n"])
    assert [stops.add(piece) for piece in ("a</", "b\n", "c<")] == ["a", "</b", "\nc"]
    assert stops.rest() == "<" and stops.found is None
