"""The memory of a training step, from a forward, a backward and an optimizer's step on fake tensors.

What trains is the caller's: PEFT puts adapters on the fake model, a loss is computed as the trainer computes it. So
what each family keeps for its backward is counted, not estimated, with and without checkpointing. What the C library
needs inside a call is counted by its own layout (`workspace`). The rest of what simulate.py cannot see holds here too.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ktransformers.operators import packed_weight
from ktransformers.rules.plan import RulesLike
from ktransformers.rules.plan import plan as plan_rules
from ktransformers.simulator.fake import fake_devices, swapped
from ktransformers.simulator.fake_weights import FakeWeights, Form, Size, stand_ins
from ktransformers.simulator.recorder import ACTIVATIONS, WEIGHTS, PassRecord, Recorder
from ktransformers.simulator.simulate import Run, Simulation, own_meta_model
from ktransformers.simulator.workspace import of_training


@dataclass
class TrainingMemory:
    """Bytes per device. `weights` are the model's, `trained` what is trained, `gradients` and `states` (of the
    optimizer) what belongs to it, `activations` the most that was there beside all of these at once, on the CPU with
    what malloc keeps; `workspace` is what the C library holds for its calls."""

    weights: dict[str, int] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    workspace: int = 0


def simulate_training(
    model_or_config: Any, rule: RulesLike, prepare: Callable[[nn.Module], nn.Module],
    loss: Callable[[nn.Module], Tensor], optimizer: Callable[[Iterable[Tensor]], Any], *, gpus: int = 0,
    devices: Mapping[str, str] | None = None, weights: Any = None, size: Size | None = None, form: Form | None = None,
    checkpoints: bool = False,
) -> TrainingMemory:  # fmt: skip
    """Two training steps, of which the second has gradients' and the optimizer's memory from the first.

    Args:
        model_or_config, rule, gpus, devices, weights, size, form: as `simulate` takes them.
        prepare: makes the loaded model, on fake devices, the one that is trained.
        loss: a forward of it to a scalar.
        optimizer: makes the optimizer of the parameters that are trained.
        checkpoints: whether `loss` computes layers again in its backward.

    Raises:
        KTransformersError: rules that do not fit the model. What torch or a library raises on the way is theirs.
    """
    model = own_meta_model(model_or_config)
    found = TrainingMemory()
    with stand_ins():
        plan = plan_rules(model, rule, devices=devices, gpus=gpus)
        run = Run(model, plan, Simulation(type(model).__name__, gpus, 1, 0, []), lambda done, total: None)
        recorder = run.recorder
        source = run.inject(FakeWeights(model, weights, size, form))
        with (
            fake_devices(), recorder, torch.enable_grad(), swapped(torch.utils, "swap_tensors", _swap),
            swapped(packed_weight, "numbers_of", lambda weight: _numbers_of(weight, recorder)),
        ):  # fmt: skip
            run.load(source)
            found.weights = recorder.live(WEIGHTS)
            net = prepare(model).train()
            trained = [p for p in net.parameters() if p.requires_grad]
            found.trained = recorder.live(ACTIVATIONS)
            steps = optimizer(trained)
            recorder.workspace = of_training
            for _ in range(2):
                steps.zero_grad(set_to_none=True)
                before = recorder.live(ACTIVATIONS)
                record = recorder.begin()
                _backward(loss(net))
                found.gradients = _by_device(p.grad for p in trained if p.grad is not None)
                steps.step()
    found.states = _less(before, found.trained)
    found.activations = _less(record.peak, before, found.gradients)
    kept = _kept_by_malloc(record, before.get("cpu", 0), checkpoints)
    found.activations["cpu"] = max(0, kept - before.get("cpu", 0) - found.gradients.get("cpu", 0))
    found.workspace = record.workspace
    return found


def _numbers_of(weight: packed_weight.ReadWeight, recorder: Recorder) -> Tensor:
    """`packed_weight.numbers_of`, which runs where no mode looks."""
    numbers = recorder.seen(weight.packed.dequantize())
    return recorder.seen(numbers.to(weight.dtype))


def _backward(loss: Tensor) -> None:
    """`loss.backward()`, past what would leave the modes of `fake_devices` outside: checkpoints compute again in it."""
    engine = torch.autograd.Variable._execution_engine
    given = (loss,), (torch.ones_like(loss),), False, False, ()
    engine.run_backward(*given, allow_unreachable=True, accumulate_grad=True)


def _swap(one: Tensor, other: Tensor) -> None:
    """torch's, which `nn.Module.to` uses for fake tensors, without its refusal of tensors that are known elsewhere:
    fake tensors are, to their mode."""
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


FRAGMENTS = {True: 1.1, False: 0.5}
"""Bytes of malloc's heap that are neither in use nor given back, for each byte that was in use for a while; with
checkpoints, whose layers are computed again between what lives on, and without. Measured with glibc 2.36 on seven
shapes of two models: 1.0 to 1.4 (once 2.4) and 0.5 to 0.6. Smaller settings of malloc end it and cost a quarter of the
speed, in page faults."""


def _kept_by_malloc(record: PassRecord, before: int, checkpoints: bool) -> int:
    """The most that a step has in RAM: glibc keeps the room of blocks up to LARGE for others of them, and gives back
    that of larger ones, so both are there when each was at its most. `before`: bytes that live through the step."""
    heap = record.apart["cpu", False]
    return heap + record.apart["cpu", True] + round(FRAGMENTS[checkpoints] * max(0, heap - before))


def _by_device(tensors: Iterable[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors:
        found[str(tensor.device)] = found.get(str(tensor.device), 0) + tensor.nbytes
    return found


def _less(all_of: Mapping[str, int], *parts: Mapping[str, int]) -> dict[str, int]:
    left = {device: nbytes - sum(part.get(device, 0) for part in parts) for device, nbytes in all_of.items()}
    return {device: max(0, nbytes) for device, nbytes in left.items()}
