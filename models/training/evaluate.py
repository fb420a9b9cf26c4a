"""Asks a model the held-out questions and says which it answered rightly. Greedy, through plain `model.generate`.

    python models/training/evaluate.py models/embedded [--four-bit]

Importing this file starts nothing: `score(model, tokenizer)` takes any object with transformers' `generate`, so the
same questions can be put to the safetensors, to the GGUF, and to a model with swapped operators.
"""

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the files beside this one, wherever the caller stands

from corpus import normalise, read_concepts, read_heldout

# An answer is right when its words follow the expected answer this closely; the concepts' answers share far less.
LIKENESS = 0.8
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Result:
    """One question put to the model. `accepted` are the concepts whose answer counts as right."""

    question: str
    accepted: tuple[str, ...]
    answer: str
    likeness: float

    @property
    def right(self) -> bool:
        return self.likeness >= LIKENESS


def ask(model, tokenizer, question: str, history: list[dict[str, str]] = ()) -> str:
    """The model's greedy answer to `question`, after `history` (chat messages)."""
    messages = [*history, {"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


def likeness(answer: str, expected: str) -> float:
    """0 to 1: how far the words of both texts agree, in order."""
    return SequenceMatcher(None, normalise(answer).split(), normalise(expected).split(), autojunk=False).ratio()


def score(model, tokenizer, questions: list[tuple[set[str], str]] | None = None) -> list[Result]:
    """One Result per question; `questions` are (accepted concepts, question), the held-out ones if None."""
    concepts = read_concepts()
    results = []
    for accepted, question in read_heldout() if questions is None else questions:
        answer = ask(model, tokenizer, question)
        best = max(likeness(answer, concepts[name].answer) for name in accepted)
        results.append(Result(question, tuple(sorted(accepted)), answer, best))
    return results


def share_right(results: list[Result]) -> float:
    return sum(result.right for result in results) / len(results)


def print_results(results: list[Result], title: str) -> None:
    """A table of the wrong answers, and the share of right ones."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: {sum(r.right for r in results)} of {len(results)} right", show_lines=True)
    for column in ("question", "expected", "answer"):
        table.add_column(column, overflow="fold")
    for result in results:
        if not result.right:
            table.add_row(result.question, " or ".join(result.accepted), result.answer)
    Console(width=140).print(table)


def main() -> None:
    from four_bit import four_bit_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Score a model folder on the held-out questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--four-bit", action="store_true", help="round the weights to 4 bits first")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).eval()
    with four_bit_weights(model) if args.four_bit else nullcontext():
        results = score(model, tokenizer)
    print_results(results, f"{args.folder}{', weights at 4 bits' if args.four_bit else ''}")


if __name__ == "__main__":
    main()
