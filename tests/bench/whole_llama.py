"""llama.cpp's side of bench_whole.py, by llama-cpp-python's low-level API: GGUF FLASH(0|1) CONTEXT, then lines of JSON."""

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path

import llama_cpp.llama_cpp as api

CHUNK, SPARE = 512, 1024


@api.llama_log_callback
def _quiet(level, text, data):
    """Nothing of what it tells while loading."""


class Llama:
    def __init__(self, path: str, flash: str, context: str) -> None:
        api.llama_log_set(_quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        threads = int(os.environ.get("KT_THREADS") or len(os.sched_getaffinity(0)))
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = int(context) + SPARE, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.no_perf = int(flash), True
        self.context = api.llama_init_from_model(self.model, params)
        self.cache = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.length = 0

    def step(self, tokens: int) -> None:
        ids = (api.llama_token * tokens)(*[random.randrange(260, self.vocabulary) for _ in range(tokens)])
        if api.llama_decode(self.context, api.llama_batch_get_one(ids, tokens)):
            raise SystemExit("llama_decode failed")
        api.llama_synchronize(self.context)
        self.length += tokens

    def prefill(self, tokens: int, count: int) -> list[float]:
        times = []
        for _ in range(count):
            api.llama_memory_clear(self.cache, True)
            self.length = 0
            start = time.perf_counter()
            for begin in range(0, tokens, CHUNK):
                self.step(min(CHUNK, tokens - begin))
            times.append(time.perf_counter() - start)
        return times

    def decode(self, tokens: int, count: int) -> list[float]:
        if not tokens <= self.length < tokens + 512:
            self.prefill(tokens, 1)
            self.step(1)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.step(1)
            times.append(time.perf_counter() - start)
        return times

    def memory(self) -> float:
        text = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def main() -> None:
    random.seed(1)
    llama = Llama(*sys.argv[1:4])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(llama, request.pop("op"))(**request)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
