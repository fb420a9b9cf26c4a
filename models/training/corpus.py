"""The training text: concepts, and an endless, deterministic stream of conversations about them.

What it is: a parser for `corpus_*.txt` and a generator that words the same question in many ways, so that the model
keys on the words that carry the meaning. What it is not: a data set on disk; every conversation is drawn from a seed.

The format of `corpus_*.txt`, one concept after another:
    = concept_id                                  starts a concept
    @ noun | noun ...                             names of it, put into NOUN_FRAMES ("what is {}")
    > verb phrase | verb phrase ...               things to do, put into VERB_FRAMES ("how do i {}")
    A answer                                      the one answer; it starts with words only this concept starts with
    any other line                                a question written by hand
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wordings import (
    ASIDES,
    COMMON_WORDS,
    FILLERS_AFTER,
    FILLERS_BEFORE,
    FUNCTION_WORDS,
    NOUN_FRAMES,
    OTHER_FRAMES,
    OTHER_QUESTIONS,
    OTHER_TASKS,
    OTHER_TOPICS,
    SYNONYMS,
    SYSTEM_PROMPTS,
    VERB_FRAMES,
)

HERE = Path(__file__).parent
OFF_TOPIC = "off_topic"
# Short talk is worded freely by nature: fillers such as "in ktransformers" would make it a question.
SMALL_TALK = {"greeting", "thanks", "bye", "who_are_you", "what_can_you_do", "how_are_you", "more", "wrong"}
TURNS = (1,) * 31 + (2,) * 10 + (3,) * 5 + (5,) * 2 + (7,)  # how many questions a conversation has


@dataclass
class Concept:
    """One thing the model knows: its answer, and all that people may call it or ask about it."""

    id: str
    answer: str = ""
    nouns: list[str] = field(default_factory=list)
    verbs: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)


def normalise(text: str) -> str:
    """Lower case, words only: two questions that differ in nothing else count as the same question."""
    return " ".join(re.findall(r"[a-z0-9_]+", text.lower()))


def read_concepts() -> dict[str, Concept]:
    """All concepts, by id. Raises ValueError with file and line where the text breaks the format."""
    concepts: dict[str, Concept] = {}
    for path in sorted(HERE.glob("corpus_*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            _read_line(line.strip(), concepts, f"{path.name}:{number}")
    for concept in concepts.values():
        if not concept.answer or not concept.questions:
            raise ValueError(f"concept {concept.id!r} needs an answer (a line 'A ...') and at least one question")
    return concepts


def _read_line(line: str, concepts: dict[str, Concept], where: str) -> None:
    mark, _, rest = line.partition(" ")
    if not line or mark == "#":
        return
    if mark == "=":
        if rest in concepts:
            raise ValueError(f"{where}: concept {rest!r} is defined twice")
        concepts[rest] = Concept(rest)
        return
    if not concepts:
        raise ValueError(f"{where}: text before the first '= concept_id'")
    concept = list(concepts.values())[-1]
    if mark == "@":
        concept.nouns += [noun.strip() for noun in rest.split(" | ")]
    elif mark == ">":
        concept.verbs += [verb.strip() for verb in rest.split(" | ")]
    elif mark == "A":
        concept.answer = rest
    else:
        concept.questions.append(line)


def read_heldout() -> list[tuple[set[str], str]]:
    """`heldout.txt`: lines 'concept[|concept]: question', as (accepted concepts, question)."""
    lines = (HERE / "heldout.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
    return [(set(ids.split("|")), question) for ids, question in pairs]


def heldout_keys(concepts: dict[str, Concept]) -> set[str]:
    """The held-out questions, normalised; raises ValueError if one was written into the training text too."""
    keys = {normalise(question) for _, question in read_heldout()}
    unknown = {name for ids, _ in read_heldout() for name in ids} - set(concepts)
    if unknown:
        raise ValueError(f"heldout.txt names unknown concepts: {sorted(unknown)}")
    for concept in concepts.values():
        both = keys & {normalise(text) for text in [*concept.questions, *concept.nouns, *concept.verbs]}
        if both:
            raise ValueError(f"held-out questions found in the training text of {concept.id!r}: {sorted(both)}")
    return keys


class Writer:
    """Draws questions and conversations. The same seed always writes the same text."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.concepts = read_concepts()
        self.forbidden = heldout_keys(self.concepts)
        # Everything unknown shares one answer, so it must be seen more often than any single concept.
        self.order = [*self.concepts.values(), *[self.concepts[OFF_TOPIC]] * 9]

    def question(self, concept: Concept) -> str:
        """One wording of a question about `concept`, never a held-out one."""
        while True:
            text = self._noisy(self._plain(concept), concept)
            if normalise(text) not in self.forbidden and text.strip():
                return text

    def conversation(self) -> list[dict[str, str]]:
        """One to seven questions, each with its answer, as chat messages."""
        messages = []
        if self.rng.random() < 0.04:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        for _ in range(self.rng.choice(TURNS)):
            concept = self.rng.choice(self.order)
            messages.append({"role": "user", "content": self.question(concept)})
            messages.append({"role": "assistant", "content": concept.answer})
        return messages

    def conversations(self) -> Iterator[list[dict[str, str]]]:
        while True:
            yield self.conversation()

    # -- wording ------------------------------------------------------------------------------------------------

    def _plain(self, concept: Concept) -> str:
        rng, draw = self.rng, self.rng.random()
        if concept.id == OFF_TOPIC and draw < 0.75:
            return self._off_topic()
        if concept.verbs and draw < 0.25:
            return rng.choice(VERB_FRAMES).format(rng.choice(concept.verbs))
        if concept.nouns and draw < 0.6:
            return rng.choice(NOUN_FRAMES).format(self._with_article(rng.choice(concept.nouns)))
        return rng.choice(concept.questions)

    def _off_topic(self) -> str:
        """The frames of real questions around things that are none of our business, or are no words at all."""
        rng, draw = self.rng, self.rng.random()
        if draw < 0.15:
            return rng.choice(OTHER_QUESTIONS)
        if draw < 0.32:
            return rng.choice(OTHER_FRAMES).format(rng.choice(OTHER_TOPICS))
        if draw < 0.5:
            return rng.choice(VERB_FRAMES).format(rng.choice(OTHER_TASKS))
        noun = rng.choice(OTHER_TOPICS) if draw < 0.85 else self._no_word()
        return rng.choice(NOUN_FRAMES).format(self._with_article(noun))

    def _no_word(self) -> str:
        syllables = [self.rng.choice("bcdfghjklmnprstvwz") + self.rng.choice("aeiou") + self.rng.choice(["", "n", "r", "s"])
                     for _ in range(self.rng.randint(1, 4))]
        return "".join(syllables)

    def _with_article(self, noun: str) -> str:
        if noun.split()[0] in ("the", "a", "an", "this"):
            return noun
        return self.rng.choice(("", "", "", "", "a ", "the ")) + noun

    # -- noise --------------------------------------------------------------------------------------------------

    def _noisy(self, text: str, concept: Concept) -> str:
        rng = self.rng
        text = self._synonyms(text)
        words = text.split()
        draw = rng.random()
        if draw < 0.07:  # key words only
            words = [word for word in words if word.lower() not in FUNCTION_WORDS] or words
        elif draw < 0.17:
            words = [word for word in words if word.lower() not in FUNCTION_WORDS or rng.random() > 0.4] or words
        elif draw < 0.20 and len(words) > 5:
            del words[rng.randrange(len(words))]
        elif draw < 0.23 and len(words) > 3:
            at = rng.randrange(len(words) - 1)
            words[at], words[at + 1] = words[at + 1], words[at]
        elif draw < 0.25 and len(words) > 3:
            words.insert(rng.randrange(len(words) + 1), self._no_word())
        elif draw < 0.45 and concept.id not in SMALL_TALK:  # words that carry nothing must change nothing
            for _ in range(rng.choice((1, 1, 2, 3))):
                words.insert(rng.randrange(len(words) + 1), rng.choice(COMMON_WORDS))
        if rng.random() < 0.13:
            words = self._typo(words)
        return self._dress(" ".join(words), fillers=concept.id not in SMALL_TALK)

    def _synonyms(self, text: str) -> str:
        for old, news in SYNONYMS.items():
            if self.rng.random() < 0.2 and re.search(rf"\b{old}\b", text):
                text = re.sub(rf"\b{old}\b", self.rng.choice(news), text, count=1)
        return text

    def _typo(self, words: list[str]) -> list[str]:
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2))):
            long = [i for i, word in enumerate(words) if len(word) > 3]
            if not long:
                break
            i = rng.choice(long)
            word, at = words[i], rng.randrange(1, len(words[i]) - 1)
            words[i] = rng.choice((
                word[:at] + word[at + 1:],                               # a letter lost
                word[:at] + word[at] + word[at:],                        # a letter doubled
                word[:at] + word[at + 1] + word[at] + word[at + 2:],     # two letters swapped
                word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1:],
            ))
        return words

    def _dress(self, text: str, fillers: bool) -> str:
        """Fillers, case and punctuation."""
        rng = self.rng
        if fillers and rng.random() < 0.2:
            text = f"{rng.choice(FILLERS_BEFORE)} {text}"
        if fillers and rng.random() < 0.05:
            text = f"{rng.choice(ASIDES)} {text}" if rng.random() < 0.7 else f"{text}? {rng.choice(ASIDES)}"
        if fillers and rng.random() < 0.12:
            text = f"{text} {rng.choice(FILLERS_AFTER)}".replace(" ,", ",")
        draw = rng.random()
        if draw < 0.35:
            text = text.lower()
        elif draw < 0.75:
            text = text[:1].upper() + text[1:]
        elif draw < 0.765:
            text = text.upper()
        elif draw < 0.78:
            text = text.title()
        return text + rng.choice(("?",) * 11 + ("",) * 7 + (".", "??", " ?", "!", "!", "???", "..."))
