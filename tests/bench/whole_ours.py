"""Our side of bench_whole.py: FOLDER WEIGHTS RULE CACHE, then lines of JSON on standard input. Single tokens go as
`engine.generate` computes them: through the recorded step where there is one."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ktransformers import native, optimize_and_load
from ktransformers.operators.paged_cache import PagedCache, paged_cache
from ktransformers.operators.stack import decode_of
from tests.bench.whole_engine import Engine, serve


class Ours(Engine):
    def __init__(self, folder: str, weights: str, rule: str, kind: str = "bf16") -> None:
        torch.set_num_threads(native.threads())
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = optimize_and_load(model, rule, weights, devices={"cuda": "cpu"}, progress=False)
        self.kind = kind
        self.vocabulary = config.vocab_size
        self.begin()

    def begin(self) -> None:
        self.cache = paged_cache(self.model, self.kind)
        self.recorded = None

    def length(self) -> int:
        return self.cache.get_seq_length()

    @torch.inference_mode()
    def step(self, ids: list[int]) -> None:
        self.recorded = (self.recorded or decode_of(self.model, self.cache)) if len(ids) == 1 else None
        if self.recorded:
            native.argmax(self.recorded(ids[0]))
            return
        out = self.model(input_ids=torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        native.argmax(out.logits[0, -1])

    @torch.inference_mode()
    def begin_batch(self, prompts: list[list[int]]) -> None:
        caches = []
        for prompt in prompts:
            self.begin()
            self.step(prompt)
            caches.append(self.cache)
        self.lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        self.cache = PagedCache.together(caches)

    @torch.inference_mode()
    def batch_step(self, ids: list[int]) -> None:
        out = self.model(
            input_ids=torch.tensor(ids)[:, None], position_ids=self.lengths, past_key_values=self.cache, use_cache=True
        )
        for row in out.logits[:, -1]:
            native.argmax(row)
        self.lengths = self.lengths + 1


if __name__ == "__main__":
    serve(Ours(*sys.argv[1:5]))
