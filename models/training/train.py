"""Trains the embedded model: `python models/training/train.py --out models/embedded`. CPU, no network, under two hours.

What it is: tokenizer -> a DeepSeek-V3-style MoE of 5.6 million parameters -> training on conversations drawn from
`corpus.py` -> BF16 safetensors in Hugging Face form -> the held-out score. What it is not: a general trainer, or the
writer of the GGUF (`python -m ktransformers.quantize` is).

Letters in shapes: B rows, T tokens, V vocabulary, E experts, K experts per token.
"""

import argparse
import copy
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))

from corpus import Writer
from evaluate import print_results, score, share_right
from four_bit import four_bit_weights
from vocabulary import BEGIN, CONTEXT, END, PAD, build_tokenizer

SEED = 20240
ROWS, ROW_TOKENS = 10, 400      # one step: B x T, each row packed with whole conversations
CUT_SHARE, CUT_TOKENS = 0.75, 10  # most last answers are cut short: the rest is soon known by heart, questions are not
PEAK_LR, WARMUP, WEIGHT_DECAY = 2e-3, 100, 0.1
QUESTION_WEIGHT = 0.02          # learning which words go together helps a little; guessing questions is not the aim
FIRST_TOKENS, FIRST_WEIGHT = 4, 2.0  # an answer's first tokens decide which answer it is
BALANCE_SPEED = 1e-3            # first step of the correction bias, DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2
FOUR_BIT_FROM = 0.6             # from this share of training on, every second step sees 4-bit weights
CHECK_EVERY = 800               # steps between a saved checkpoint and a look at the held-out questions

console = Console()


def make_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3Config:
    """Every row is a multiple of 256 wide, as the K quantizations need."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=512,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=256,
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=256, kv_lora_rank=256,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, num_mtp_layers=0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> DeepseekV3ForCausalLM:
    """Random weights, and the two implementations that were measured fastest at training on a CPU."""
    model = DeepseekV3ForCausalLM(make_config(tokenizer)).train()
    model.set_experts_implementation("grouped_mm")
    model.set_attn_implementation("eager")
    return model


# -- data -------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Packed conversations. `tokens`, `positions`, `segments` (0 is padding) are [B, T]; `weights` [B, T] of the loss."""

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    weights: torch.Tensor

    def mask(self) -> torch.Tensor:
        """[B, 1, T, T] to add to attention scores: 0 where a token may look, at earlier tokens of its own conversation."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        seen = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)[:, None]


def encode(conversation: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, cut: bool = False) -> tuple[list[int], list[float]]:
    """Tokens of a conversation, exactly as the chat template renders it, and the weight of each token in the loss.

    With `cut`, the last answer ends after CUT_TOKENS, without an end token.
    """
    special = tokenizer.convert_tokens_to_ids
    tokens, weights = [special(BEGIN)], [0.0]
    for message in conversation:
        body = tokenizer.encode(message["content"], add_special_tokens=False)
        tokens += [special(f"<|{message['role']}|>"), *body, special(END)]
        if message["role"] == "assistant":
            weights += [0.0, *(FIRST_WEIGHT if i < FIRST_TOKENS else 1.0 for i in range(len(body))), 1.0]
        else:
            weights += [0.0, *[QUESTION_WEIGHT] * len(body), QUESTION_WEIGHT]
    rest = len(body) + 1 - CUT_TOKENS
    return (tokens[:-rest], weights[:-rest]) if cut and rest > 0 else (tokens, weights)


class Packer:
    """Fills rows of ROW_TOKENS with whole conversations; what does not fit a row waits for the next."""

    def __init__(self, writer: Writer, tokenizer: PreTrainedTokenizerFast):
        self.writer, self.tokenizer = writer, tokenizer
        self.pad = tokenizer.convert_tokens_to_ids(PAD)
        self.waiting: list[tuple[list[int], list[float]]] = []

    def batch(self) -> Batch:
        rows = [self._row() for _ in range(ROWS)]
        return Batch(*(torch.tensor(column) for column in zip(*rows, strict=True)))

    def _row(self) -> tuple[list[int], list[int], list[int], list[float]]:
        tokens, positions, segments, weights = [], [], [], []
        while (piece := self._piece(ROW_TOKENS - len(tokens))) is not None:
            segments += [segments[-1] + 1 if segments else 1] * len(piece[0])
            positions += range(len(piece[0]))
            tokens += piece[0]
            weights += piece[1]
        rest = ROW_TOKENS - len(tokens)
        return tokens + [self.pad] * rest, positions + [0] * rest, segments + [0] * rest, weights + [0.0] * rest

    def _piece(self, room: int) -> tuple[list[int], list[float]] | None:
        while len(self.waiting) < 32:
            piece = encode(self.writer.conversation(), self.tokenizer, cut=self.writer.rng.random() < CUT_SHARE)
            if len(piece[0]) <= ROW_TOKENS:  # a very long conversation is left out, not cut
                self.waiting.append(piece)
        for i, piece in enumerate(self.waiting):
            if len(piece[0]) <= room:
                return self.waiting.pop(i)
        return None


# -- training ---------------------------------------------------------------------------------------------------------

class Balancer:
    """Keeps experts equally busy without a loss term: the correction bias of busy ones falls, of idle ones rises."""

    def __init__(self, model: DeepseekV3ForCausalLM):
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.loads = [torch.zeros(gate.num_experts) for gate in self.gates]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.register_forward_hook(lambda _, __, output, load=load: self._count(output[2], load))

    @staticmethod
    def _count(chosen: torch.Tensor, load: torch.Tensor) -> None:
        """`chosen` [T, K] are expert ids; `load` [E]."""
        load += torch.bincount(chosen.flatten(), minlength=len(load))

    def step(self, speed: float) -> float:
        """Moves the biases by the sign of the load error; returns the worst load over the mean load."""
        worst = 0.0
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)
            worst = max(worst, float(load.max() / load.mean()))
            load.zero_()
        return worst


def loss_of(model: DeepseekV3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean loss of the next token, weighted; matrix products in bf16, which today's CPUs do twice as fast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask(), use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(step: int, steps: int) -> float:
    """As a share of the peak: linear warm-up, then half a cosine down to 2 %."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    share = (step - WARMUP) / max(1, steps - WARMUP)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: DeepseekV3ForCausalLM) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def train(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, out: Path, seed: int, peak: float) -> None:
    """`steps` steps on the text of `seed`; saves to `out` now and then, so an interrupted run leaves a model behind."""
    packer, balancer, optimizer = Packer(Writer(seed), tokenizer), Balancer(model), make_optimizer(model)
    started, mean = time.monotonic(), None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, state="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(step, steps)
            rounded = step >= FOUR_BIT_FROM * steps and step % 2 == 1
            with four_bit_weights(model) if rounded else nullcontext():
                loss = loss_of(model, packer.batch())
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            worst = balancer.step(BALANCE_SPEED * learning_rate(step, steps))
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            progress.update(task, advance=1, state=f"loss {mean:.3f}")
            if step % 50 == 0:
                seconds = time.monotonic() - started
                console.print(f"step {step} loss {mean:.4f} worst load {worst:.2f} {seconds:.0f} s")
            if step and step % CHECK_EVERY == 0:
                check(model, tokenizer, out)


def check(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    saved = save(model, tokenizer, out)
    console.print(f"saved {out}; held-out questions answered: {share_right(score(saved, tokenizer)):.1%}")


def save(model: DeepseekV3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> DeepseekV3ForCausalLM:
    """Writes the Hugging Face folder; returns the BF16 model as it was written. The correction bias stays fp32."""
    small = copy.deepcopy(model).eval()
    for weight in small.parameters():
        weight.data = weight.data.bfloat16()
    small.config.dtype = torch.bfloat16
    small.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    small.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read
    tokenizer.save_pretrained(out)
    return small


def steps_for(minutes: float, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many steps fit, measured on a model thrown away afterwards."""
    model = make_model(tokenizer)
    packer = Packer(Writer(SEED), tokenizer)
    loss_of(model, packer.batch()).backward()
    started = time.monotonic()
    for _ in range(5):
        loss_of(model, packer.batch()).backward()
    return max(WARMUP, int(minutes * 60 / ((time.monotonic() - started) / 5 * 1.1)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model on the text in this folder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "embedded", help="folder to write (default: models/embedded)")
    parser.add_argument("--steps", type=int, default=3200, help="training steps; 3200 take 45 minutes on one core of 2025")
    parser.add_argument("--minutes", type=float, help="instead of --steps: as many as fit; then not reproducible")
    parser.add_argument("--resume", type=Path, help="folder to go on from, with new text, instead of from random weights")
    parser.add_argument("--peak-lr", type=float, default=PEAK_LR, help="highest learning rate; half of it suits --resume")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume) if args.resume else build_tokenizer(SEED)
    steps = steps_for(args.minutes, tokenizer) if args.minutes else args.steps
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    if args.resume:
        model.load_state_dict(DeepseekV3ForCausalLM.from_pretrained(args.resume, dtype=torch.float32).state_dict())
    console.print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {steps} steps")
    train(model, tokenizer, steps, args.out, seed=SEED + bool(args.resume), peak=args.peak_lr)
    small = save(model, tokenizer, args.out)
    print_results(score(small, tokenizer), "BF16")
    with four_bit_weights(small):
        print_results(score(small, tokenizer), "weights at 4 bits")


if __name__ == "__main__":
    main()
