"""Benchmarks of a training step on a CPU, uncompiled: the cpu preset's forward and backward, optimiser, whole step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pgolf import config, presets
from pgolf.clock import TimeLedger
from pgolf.data.batch import Batch
from pgolf.dist import Dist
from pgolf.log import RunLog
from pgolf.model.gpt import GPT
from pgolf.train import Trainer

from . import naive
from .fixtures import corpus, look_trained_, one_thread, scratch  # noqa: F401
from .ratios import CPU_TIME, gate, rates

MOMENTUM = presets.cpu().optim.muon.momentum_start  # of step 0


@contextmanager
def running() -> Iterator[Trainer]:
    """The cpu preset on the benchmarks' corpus, with weights as after training."""
    environ = {"PRESET": "cpu", "DATA_PATH": str(corpus().folder), "TOKENIZER_PATH": str(corpus().tokenizer_path)}
    settings = config.load(["train.device=cpu", "train.compile=off"], environ)
    with RunLog(scratch() / "run", console=False) as log:
        made = Trainer(settings.config, Dist(), log, TimeLedger())
        look_trained_(made.model)
        yield made
        made.loader.close()


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with running() as made:
        yield made


def gradients(model: GPT, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of the mean cross-entropy, computed in fp64 by a copy of the model."""
    wide = GPT(model.cfg, train_length=model.train_length, compute_dtype=torch.float64)
    wide.load_state_dict(model.state_dict())
    loss = wide(batch)[0].mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in wide.named_parameters()}


def forward_backward(trainer: Trainer, batch: Batch) -> Tensor:
    trainer.optim.zero_grad()
    loss, _ = trainer.compute_loss(batch)
    loss.backward()
    return loss


def assert_step_is_right(trainer: Trainer) -> None:
    """A step moves every weight as fp64 gradients and one parameter at a time do."""
    oracle = naive.Optimizer(trainer.optim.groups, trainer.cfg.optim.muon.ns_steps)
    before = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    state = trainer.loader.state_dict()
    _, grads = gradients(trainer.model, trainer.loader.next_batch())
    trainer.loader.load_state_dict(state)
    oracle.step(grads, 1.0, MOMENTUM)
    trainer.step(1.0, 0)
    for name, p in trainer.model.named_parameters():
        way, expected = p.detach().double() - before[name], oracle.weights[name] - before[name]
        error = ((way - expected).norm() / expected.norm()).item()
        assert error <= 1e-2, f"{name}: its step is off by {error:.2g} of its length, allowed 0.01"


@pytest.mark.benchmark(group="step")
def test_forward_backward(benchmark, trainer):
    """Loss and gradients of 1,024 tokens, against the forward pass alone."""
    batch = trainer.loader.next_batch()
    loss, grads = gradients(trainer.model, batch)
    got = forward_backward(trainer, batch).item()
    assert abs(got - loss) <= 1e-5 * loss, f"loss {got}, expected {loss}"
    for name, p in trainer.model.named_parameters():
        error = naive.relative_error(p.grad, grads[name])
        assert error <= 1e-3, f"{name}: gradient off by {error:.2g} of its largest, allowed 0.001"

    @torch.no_grad()
    def forward() -> None:
        trainer.compute_loss(batch)

    both = lambda: forward_backward(trainer, batch)
    gate(benchmark, ("both", both), ("forward", forward), at_most=4)
    benchmark(both)
    rates(benchmark, tokens=batch.ids.numel())


def update(trainer) -> None:
    """From gradients in place to new weights. The gradients stay."""
    trainer.optim.reduce_(torch.zeros(()))
    trainer.optim.step()


@pytest.mark.benchmark(group="step")
def test_optimizer(benchmark, trainer):
    """Muon and AdamW over all parameters, against forward and backward: it must stay the smaller part."""
    assert_step_is_right(trainer)
    trainer.optim.set(0.0, MOMENTUM)
    batch = trainer.loader.next_batch()
    both = lambda: forward_backward(trainer, batch)
    both()  # its gradients are stepped on
    step = lambda: update(trainer)
    gate(benchmark, ("step", step), ("forward and backward", both), at_most=0.7)
    benchmark(step)
    rates(benchmark, parameters=sum(p.numel() for p in trainer.optim.params))


@pytest.mark.benchmark(group="step")
def test_whole_step(benchmark, trainer):
    """Trainer.step, against its parts alone on one batch: the loader and bookkeeping must cost next to nothing."""
    assert_step_is_right(trainer)
    batch = trainer.loader.next_batch()

    def parts() -> None:
        forward_backward(trainer, batch)
        update(trainer)

    trainer.optim.set(0.0, MOMENTUM)  # the weights stay, so that every step does the same
    step = lambda: trainer.step(0.0, 0)
    gate(benchmark, ("Trainer.step", step), ("its parts", parts), at_most=1.15, seconds=3, clock=CPU_TIME)
    benchmark(step)
    rates(benchmark, tokens=trainer.loader.tokens_per_step)


@pytest.mark.benchmark(group="step")
def test_whole_step_two_threads(benchmark, trainer):
    """Trainer.step as the preset runs it on two cores. Its time is recorded only: it depends on what else they do."""
    torch.set_num_threads(2)
    assert_step_is_right(trainer)
    benchmark(trainer.step, 0.0, 0)
    rates(benchmark, tokens=trainer.loader.tokens_per_step)
