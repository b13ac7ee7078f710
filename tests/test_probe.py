"""A switch that does not reach the forward pass fails the run: in warm-up, where a phase starts, and when resumed."""

import shutil

import pytest
import torch
from resuming import SHORT
from test_train import events, make_trainer, only_run, run, settings

from pgolf import phases, probe, snapshot
from pgolf.errors import NumericalError
from pgolf.quant.weight_cast import BankCast

SHORTEST = ("train.iterations=6", "schedule.warmdown_iters=5", "eval.stride=0", "train.val_loss_every=0")
QUICK = (*SHORTEST, "quant.late_qat.threshold=0.9")
CASTS = ("off", "on")


def break_toggling(monkeypatch):
    """What the public scripts had: the flag flips and says so, and the forward does not see it."""
    monkeypatch.setattr(phases.fake_quant, "attach", lambda model, infos, cfg: 12)
    monkeypatch.setattr(BankCast, "how", lambda self, quantize: {"quantize": False})


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("warm_up", [2, 0])
def test_a_switch_without_effect_ends_the_run(shards, tmp_path, monkeypatch, cast, warm_up):
    break_toggling(monkeypatch)
    options = (f"kernels.weight_cast={cast}", f"train.warmup_steps={warm_up}")
    with pytest.raises(NumericalError, match=r"late_qat \(.* matrices .*\) does not change the forward pass") as caught:
        run(settings(shards, tmp_path, *QUICK, *options))
    assert caught.value.exit_code == 6
    path = only_run(tmp_path)
    # in warm-up not one step has been paid for; without one, none was made with the switch that does nothing
    assert len(events(path, "step")) == (0 if warm_up else 2) and not events(path, "phase")
    assert not (path / "model.pgolf").exists()


def test_a_switch_that_works_is_silent_from_the_first_step_on(shards, tmp_path):
    """At the start projections are zero and nothing behind them shows, which must not count as no effect."""
    options = ("quant.late_qat.threshold=2", "train.warmup_steps=0")
    for cast in CASTS:
        run(settings(shards, tmp_path / cast, *QUICK, *options, f"kernels.weight_cast={cast}"))
        (phase,) = events(only_run(tmp_path / cast), "phase")
        assert phase["step"] == 0


@pytest.mark.parametrize("cast", CASTS)
def test_a_resumed_run_is_watched_too(shards, tmp_path, monkeypatch, cast):
    option = f"kernels.weight_cast={cast}"
    run(settings(shards, tmp_path, *SHORT, option))
    path = only_run(tmp_path)
    for later in sorted((path / snapshot.FOLDER).iterdir())[2:]:  # back to step 6, late in QAT
        shutil.rmtree(later)
    saved = sorted(p.name for p in (path / snapshot.FOLDER).iterdir())
    break_toggling(monkeypatch)
    with pytest.raises(NumericalError, match=r"late_qat .* does not change the forward pass"):
        run(settings(shards, tmp_path, *SHORT, option, f"train.resume={path}"))
    assert sorted(p.name for p in (path / snapshot.FOLDER).iterdir()) == saved


@pytest.mark.parametrize("cast", CASTS)
def test_probing_leaves_no_trace(shards, tmp_path, cast):
    trainer = make_trainer(shards, tmp_path, f"kernels.weight_cast={cast}")
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    assert any(not p.any() for p in before.values())
    rng, order = torch.get_rng_state(), trainer.loader.state_dict()
    first, again = probe.losses(trainer), probe.losses(trainer)
    assert first == again and len(first[0]) == 2 and first[0][0] != first[0][1]
    assert torch.equal(rng, torch.get_rng_state()) and trainer.loader.state_dict() == order
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())
    assert all(info.param.grad is None for info in trainer.infos)
    got, want = next(probe.batches(trainer)), trainer.loader.next_batch()
    assert got.ids.shape == want.ids.shape and got.ids.stride() == want.ids.stride() and got.ids.dtype == want.ids.dtype
    assert torch.equal(got.ids[:, 1:], got.targets[:, :-1]) and int(got.ids.max()) < trainer.cfg.model.embed.vocab_size
    trainer.loader.close()


def test_one_rank_without_effect_is_enough():
    answers = iter([[[1.0, 2.0], [3.0, 4.0]], [[1.5, 2.0], [3.0, 4.0]]])
    phase = phases.Phase("late_qat", lambda scale: True, lambda: "said", lambda: None, in_forward=True)
    watched = phases.Phases.__new__(phases.Phases)
    watched.phases, watched.probe = [phase], lambda: next(answers)
    with pytest.raises(NumericalError, match="on rank 1 the losses of fixed batches are"):
        watched.apply(0.5)


def test_crown_q_moves_the_gradients_from_its_threshold_on(shards, tmp_path):
    """Two runs, one with a strong penalty: the same losses up to the step after it starts, and others from there on."""
    out = {}
    for name, extra in (("plain", ()), ("penalty", ("quant.crown_q=on", "quant.crown_q.coef=1e6",
                                                    "quant.crown_q.threshold=0.7"))):  # fmt: skip
        run(settings(shards, tmp_path / name, *SHORTEST, "quant.late_qat=none", "average.ema=none", *extra))
        out[name] = [e["train_loss"] for e in events(only_run(tmp_path / name), "step")]
    (phase,) = events(only_run(tmp_path / "penalty"), "phase")
    at = phase["step"]
    assert phase["name"] == "crown_q" and 1 < at < 5
    assert out["plain"][: at + 1] == out["penalty"][: at + 1]
    assert out["plain"][at + 1 :] != out["penalty"][at + 1 :]


def test_crown_q_is_the_same_with_and_without_a_weight_cast(shards, tmp_path):
    grads = []
    for cast in CASTS:
        trainer = make_trainer(shards, tmp_path / cast, f"kernels.weight_cast={cast}", "quant.crown_q=on",
                               "quant.crown_q.coef=100", "quant.late_qat=none")  # fmt: skip
        trainer.phases.apply(0.0)
        seen = {}
        trainer.optim.step = lambda trainer=trainer, seen=seen: seen.update(
            {i.name: i.param.grad.clone() for i in trainer.infos if i.param.grad is not None}
        )
        trainer.step(1.0, 0)
        trainer.loader.close()
        grads.append(seen)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
