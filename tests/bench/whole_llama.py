"""llama.cpp's side of bench_whole.py, by llama-cpp-python's low-level API: GGUF FLASH(0|1) CONTEXT CACHE, then
lines of JSON."""

import ctypes
import os
import struct
import sys

import llama_cpp.llama_cpp as api

from tests.bench.whole_engine import CHUNK, Engine, serve

SPARE, SEQUENCES = 1024, 16
COMPUTED = 4096
"""Tokens of a prompt that are computed before decoding; `Llama._prompt`."""
CACHES = {"f16": 1, "bf16": 30, "q8_0": 8}  # ggml_type


@api.llama_log_callback
def _quiet(level, text, data):
    """Nothing of what it tells while loading."""


def repeated(state: bytes, tokens: int) -> bytes:
    """The state of sequence 0, its rows repeated until it holds so many tokens, at positions one after the other.

    The layout of llama_state_seq_get_data, numbers little-endian: u32 magic, u32 sequence (0), u32 streams (1), u32 cells;
    for each cell i32 position, u32 sequences (1), i32 the sequence; u32 transposed (0), u32 layers; for each layer the
    keys, then for each layer the values: i32 type, u64 bytes of a row, the rows.
    """
    magic, sequence, streams, cells = struct.unpack_from("<4I", state)
    at = 16 + 12 * cells
    transposed = struct.unpack_from("<I", state, at)[0] if at + 8 <= len(state) else 1
    if (sequence, streams, transposed) != (0, 1, 0):
        raise SystemExit(f"llama.cpp's state has another layout than this reads: {state[:64].hex(' ', 4)}")
    layers = struct.unpack_from("<I", state, at + 4)[0]
    places = b"".join(struct.pack("<iIi", i, 1, 0) for i in range(tokens))
    out = [struct.pack("<4I", magic, 0, 1, tokens), places, state[at : at + 8]]
    at += 8
    for _ in range(2 * layers):
        row = struct.unpack_from("<iQ", state, at)[1]
        rows = state[at + 12 : at + 12 + row * cells]
        out += [state[at : at + 12], (rows * (tokens // cells + 1))[: row * tokens]]
        at += 12 + row * cells
    if at != len(state):
        raise SystemExit(f"llama.cpp's state has {len(state)} bytes, {at} of them were understood")
    return b"".join(out)


class Llama(Engine):
    def __init__(self, path: str, flash: str, context: str, cache: str = "f16") -> None:
        api.llama_log_set(_quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = int(context) + SPARE, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = int(os.environ.get("KT_THREADS") or len(os.sched_getaffinity(0)))
        params.flash_attn_type, params.no_perf, params.n_seq_max = int(flash), True, SEQUENCES
        params.kv_unified = True
        params.type_k = params.type_v = CACHES[cache]
        self.context = api.llama_init_from_model(self.model, params)
        self.cache = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.begin()

    def begin(self) -> None:
        api.llama_memory_clear(self.cache, True)
        self.cached = 0

    def length(self) -> int:
        return self.cached

    def step(self, ids: list[int]) -> None:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(self.context, api.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        api.llama_synchronize(self.context)
        self.cached += len(ids)

    def _prompt(self, tokens: int) -> None:
        """Long ones by repeating the cache's rows: computing them takes minutes, and decoding reads any rows as fast."""
        super()._prompt(min(tokens, COMPUTED))
        if tokens > COMPUTED:
            self._restore(repeated(self._saved(), tokens))
            self.cached = tokens

    def _saved(self) -> bytes:
        state = (ctypes.c_uint8 * api.llama_state_seq_get_size(self.context, 0))()
        size = api.llama_state_seq_get_data(self.context, state, len(state), 0)
        return bytes(state)[:size]

    def _restore(self, state: bytes) -> None:
        self.begin()
        if not api.llama_state_seq_set_data(self.context, (ctypes.c_uint8 * len(state)).from_buffer_copy(state), len(state), 0):
            raise SystemExit("llama.cpp refuses a longer state made of its own: has its layout changed?")

    def begin_batch(self, prompts: list[list[int]]) -> None:
        self.begin()
        self.lengths = [0] * len(prompts)
        for i, prompt in enumerate(prompts):
            self._decode([(i, token) for token in prompt])

    def batch_step(self, ids: list[int]) -> None:
        self._decode(list(enumerate(ids)))

    def _decode(self, tokens: list[tuple[int, int]]) -> None:
        """Tokens with the numbers of their sequences; logits of each sequence's last."""
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (sequence, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.lengths[sequence], 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i + 1 == len(tokens) or tokens[i + 1][0] != sequence
            self.lengths[sequence] += 1
        failed = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise SystemExit("llama_decode failed")
        api.llama_synchronize(self.context)


if __name__ == "__main__":
    serve(Llama(*sys.argv[1:5]))
    os._exit(0)
