"""Our side of bench_whole.py: FOLDER WEIGHTS RULE, then lines of JSON on standard input."""

import json
import random
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import native, optimize_and_load
from ktransformers.operators.paged_cache import paged_cache
from tests.bench.bench_model import status

CHUNK = 512


class Ours:
    """A model and a cache at some depth."""

    def __init__(self, folder: str, weights: str, rule: str) -> None:
        torch.set_num_threads(native.threads())
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = optimize_and_load(model, rule, weights, devices={"cuda": "cpu"}, progress=False)
        self.vocabulary, self.cache = config.vocab_size, None

    @torch.inference_mode()
    def step(self, tokens: int) -> None:
        ids = torch.tensor([[random.randrange(260, self.vocabulary) for _ in range(tokens)]])
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        out.logits[0, -1].argmax().item()

    def prefill(self, tokens: int, count: int) -> list[float]:
        times = []
        for _ in range(count):
            self.cache = paged_cache(self.model)
            start = time.perf_counter()
            for begin in range(0, tokens, CHUNK):
                self.step(min(CHUNK, tokens - begin))
            times.append(time.perf_counter() - start)
        return times

    def decode(self, tokens: int, count: int) -> list[float]:
        """`count` tokens one by one, behind `tokens` of context, give or take the slices before."""
        length = 0 if self.cache is None else self.cache.get_seq_length()
        if not tokens <= length < tokens + 512:
            self.prefill(tokens, 1)
            self.step(1)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.step(1)
            times.append(time.perf_counter() - start)
        return times

    def memory(self) -> float:
        return status("VmRSS")


def main() -> None:
    random.seed(1)
    ours = Ours(*sys.argv[1:4])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(ours, request.pop("op"))(**request)), flush=True)


if __name__ == "__main__":
    main()
