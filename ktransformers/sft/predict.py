"""Answers to a dataset and how near they come to its own: BLEU, ROUGE and exact matches, in LLaMA-Factory's names."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ktransformers.engine.generate import generate
from ktransformers.engine.sampling import Sampling
from ktransformers.errors import SFTError
from ktransformers.sft.data import read_examples
from ktransformers.sft.encode import render
from ktransformers.sft.options import Options
from ktransformers.sft.train import open_model

METRICS = ("nltk", "rouge_score")
"""Packages that score; part of the extra `sft`."""


@dataclass
class Predicted:
    """Where the answers are, and scores from 0 to 100, means over examples."""

    file: str
    metrics: dict[str, float] = field(default_factory=dict)


def predict(options: Options, notify: Callable[[str], None], on_step: Callable[[str], None]) -> Predicted:
    """Answer each example of `eval_dataset`, or of `dataset`; answers and scores go to `output_dir`."""
    if missing := [name.replace("_", "-") for name in METRICS if find_spec(name) is None]:
        raise SFTError(f"do_predict needs {', '.join(missing)}. Install with: pip install 'ktransformers[sft]'")
    names = options.eval_dataset or options.dataset
    if not names:
        raise SFTError("do_predict: names no dataset; say eval_dataset, or dataset.")
    examples = read_examples(names, options.dataset_dir, options.max_samples, options.default_system)
    model, tokenizer = open_model(options, notify, on_step, trains=False)
    model.eval()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file, scores = folder / "generated_predictions.jsonl", []
    with file.open("w") as out:
        for number, example in enumerate(examples, 1):
            on_step(f"answering {number} of {len(examples)}")
            *asked, answer = example.messages
            prompt = render(asked, tokenizer, example.tools, asks=True)
            said = _answer(model, tokenizer, prompt, options)
            out.write(json.dumps({"prompt": prompt, "predict": said, "label": answer["content"]}) + "\n")
            scores.append(score(said, answer["content"]))
    means = {name: round(100 * sum(s[name] for s in scores) / len(scores), 4) for name in scores[0]}
    (folder / "predict_results.json").write_text(json.dumps(means, indent=2) + "\n")
    return Predicted(str(file), means)


def _answer(model: Any, tokenizer: Any, prompt: str, options: Options) -> str:
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.temperature, config.top_p, config.top_k = (
        options.do_sample, options.temperature, options.top_p, options.top_k
    )  # fmt: skip
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = generate(
        model, ids, max_new_tokens=options.max_new_tokens, chunk_size=options.chunk_size, sampling=Sampling(config),
        tokenizer=tokenizer,
    )  # fmt: skip
    return tokenizer.decode(list(new), skip_special_tokens=True)


def score(said: str, expected: str) -> dict[str, float]:
    """BLEU-4 with smoothing (Chen and Cherry 2014, method 3), ROUGE-1, -2, -L F-measures, and exact match; 0 to 1."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words()).score(expected, said)
    words, wanted = _words(said), _words(expected)
    bleu = sentence_bleu([wanted], words, smoothing_function=SmoothingFunction().method3) if words else 0.0
    return {
        "predict_bleu-4": float(bleu), "predict_rouge-1": rouge["rouge1"].fmeasure,
        "predict_rouge-2": rouge["rouge2"].fmeasure, "predict_rouge-l": rouge["rougeL"].fmeasure,
        "predict_exact_match": float(said.strip() == expected.strip()),
    }  # fmt: skip


def _words(text: str) -> list[str]:
    """Words between spaces; in texts without spaces, such as Chinese, each character is one."""
    return [piece for word in text.split() for piece in (list(word) if any(ord(c) > 0x2E80 for c in word) else [word])]


class _Words:
    """How rouge_score is told to cut texts."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text.lower())
