"""Calibration in a run: what it sees, what it changes, what time it takes; the same on one rank and on two."""

import hashlib
import multiprocessing as mp
import os
import socket
import traceback
from functools import partial

import pytest
import torch
from resuming import last, text
from test_train import events, make_trainer, only_run, settings

from pgolf import calibrate, config, finish
from pgolf.artifact.pack import unpack
from pgolf.calibrate import Calibration, Cost
from pgolf.clock import TimeLedger
from pgolf.dist import start
from pgolf.log import RunLog
from pgolf.quant.hessian import Hessians
from pgolf.run import run
from pgolf.train import Trainer

GPTQ = ("quant.gptq=on", "quant.gptq.batches=6")
SHORT = ("train.iterations=6", "train.warmup_steps=0", "eval.stride=0", "train.val_loss_every=0", "average.ema=none")
EGGROLL = ("quant.eggroll=on", "quant.eggroll.probes=12", "quant.eggroll.indices=64")
CAPPED = ("train.max_wallclock_seconds=60", "train.iterations=4", "train.warmup_steps=0", "quant.late_qat=none")


def records_of(out):
    return {r.name: r for r in unpack((only_run(out) / "model.pgolf").read_bytes())[0]}


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory):
    """Stored tensors of a short run without calibration."""
    out = tmp_path_factory.mktemp("plain")
    result = run(settings(shards, out, *SHORT))
    assert result["calibration"] == {} and "calibrate" not in result["ledger"]
    return records_of(out)


def test_gptq_in_a_run(shards, tmp_path, plain):
    """The matrices, and only they, are other integers; the log and the result say what was done, and of what."""
    result = run(settings(shards, tmp_path, *SHORT, *GPTQ))
    records = records_of(tmp_path)
    changed = {name for name in plain if plain[name] != records[name]}
    assert all(records[name].role in ("matrix", "side_matrix") for name in changed)
    assert {f"blocks.{i}.{m}.weight" for i in range(3) for m in ("attn.q", "attn.v", "mlp.up")} <= changed
    facts = result["calibration"]
    assert (facts["source"], facts["rounds"], facts["of"], facts["tokens"]) == ("train", 6, 6, 6 * 256)
    assert facts["matrices"] == 19 and facts["seconds"] > facts["hessian_seconds"] > 0
    assert result["ledger"]["calibrate"]["counted"] == "training"
    assert result["ledger"]["calibrate"]["seconds"] == pytest.approx(facts["seconds"], abs=0.05)
    (event,) = events(only_run(tmp_path), "calibration")
    assert event["tokens"] == 1536
    said = text(only_run(tmp_path))
    assert "gptq: 19 matrices by 1,536 tokens of the training stream" in said
    assert "rounded plainly, being tables or left out by setting: embed.weight, embed.bigram.table" in said


def test_the_parts_are_those_of_the_averaged_weights(shards, tmp_path):
    """Late QAT is over and the average is loaded: Hessians of the model that is exported."""
    trainer = make_trainer(shards, tmp_path, *GPTQ, "train.warmup_steps=0", "train.iterations=6", "quant.keep_numel=0")
    trainer.train()
    trainer.phases.undo()
    finish.load_average(trainer)
    given = trainer.calibration.run()
    hessians, stream = Hessians(trainer.model, given), trainer.new_loader()
    for _ in range(6):
        hessians.add(stream.next_batch())
    stream.close()
    for name, parts in given.items():
        want = trainer.calibration.solve(name, hessians.of(name))
        assert all((parts[key] == want[key]).all() for key in want), name
    assert len(given) == 20


@pytest.mark.parametrize(
    "change",
    [
        ("quant.gptq.variant=v7",),
        ("quant.gptq.damp=1",),
        ("quant.gptq.skip_mlp=true",),
        ("quant.gptq.generated=on", "quant.gptq.generated.sequences=2"),
    ],
    ids=lambda change: change[0].removeprefix("quant.gptq."),
)
def test_each_setting_changes_the_parts(shards, tmp_path, change):
    runs = []
    for name, more in (("a", ()), ("b", change)):
        # an untrained model has weights of zero, for which all is one
        trainer = make_trainer(shards, tmp_path / name, *GPTQ, "quant.matrix=int6", "quant.late_qat=none", *more)
        for _ in range(3):
            trainer.step(1.0, 0)
        runs.append(trainer.calibration.run())
    same = [n for n in runs[0] if n in runs[1] and (runs[0][n]["q"] == runs[1][n]["q"]).all()]
    if "skip_mlp" in change[0]:
        assert len(runs[0]) - len(runs[1]) == 6 and len(same) == len(runs[1])
    else:
        assert runs[0].keys() == runs[1].keys() and len(same) < len(runs[0])


def test_generated_text_needs_no_data(shards, tmp_path, monkeypatch):
    trainer = make_trainer(shards, tmp_path, *GPTQ, "quant.gptq.generated=on", "quant.gptq.generated.sequences=3",
                           "quant.gptq.generated.rows=2", "data.seq_len=32")  # fmt: skip
    trainer.step(1.0, 0)
    monkeypatch.setattr(Trainer, "new_loader", lambda self: pytest.fail("reads training data"))
    given = trainer.calibration.run()
    facts = trainer.calibration.facts
    assert len(given) == 19 and (facts["source"], facts["tokens"], facts["of"]) == ("generated", 96, 2)


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_reserve_is_measured_and_taken_off(shards, tmp_path):
    trainer = make_trainer(shards, tmp_path, *GPTQ, *CAPPED)
    weights = [p.clone() for p in trainer.model.parameters()]
    trainer.calibration.keep_reserve()
    cost = trainer.calibration.cost
    assert min(cost.round, cost.solve) > 0 == cost.search
    want = calibrate.MARGIN * (6 * cost.round + cost.solve)
    assert trainer.reserve_ms == pytest.approx(1000 * want) and trainer.clock.cap_ms == 60_000 - trainer.reserve_ms
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert trainer.loader.state_dict() == {"tokens": 0}


def test_a_trial_of_a_single_batch(shards, tmp_path):
    trainer = make_trainer(shards, tmp_path, "quant.gptq=on", "quant.gptq.batches=1", *CAPPED)
    trainer.calibration.keep_reserve()
    assert trainer.calibration.cost.round > 0 and trainer.calibration.rounds == 1


def test_a_reserve_that_is_set_stays_and_is_judged(shards, tmp_path):
    for ms, judged in ((1, True), (50_000, False)):
        trainer = make_trainer(shards, tmp_path / str(ms), *GPTQ, *CAPPED, f"train.reserve_ms={ms}")
        trainer.calibration.keep_reserve()
        assert trainer.reserve_ms == ms and trainer.clock.cap_ms == 60_000 - ms
        assert ("too little" in (tmp_path / str(ms) / "train.log").read_text()) == judged


def test_without_a_cap_or_calibration_nothing_is_measured(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Calibration, "_measure", lambda self: pytest.fail("measured"))
    for name, more in (("a", GPTQ), ("b", CAPPED)):
        trainer = make_trainer(shards, tmp_path / name, *more)
        trainer.calibration.keep_reserve()
        assert trainer.reserve_ms == 0


@pytest.mark.alone
def test_training_and_calibration_end_within_the_limit(shards, tmp_path):
    """By the clock, with a calibration of half a second: steps end early enough, and all batches are taken."""
    more = ("train.iterations=100000", "train.max_wallclock_seconds=3", "quant.gptq.batches=60")
    result = run(settings(shards, tmp_path, *SHORT[1:], "quant.gptq=on", *more))
    calibrated = result["ledger"]["calibrate"]["seconds"]
    (reserve,) = events(only_run(tmp_path), "reserve")
    assert 3 - reserve["seconds"] <= result["train_seconds"] < 3
    assert result["train_seconds"] + calibrated <= 3.3
    assert result["calibration"]["reserve_seconds"] == reserve["seconds"] > 0


@pytest.mark.parametrize(("batch_s", "solve_s", "rounds", "solved"), [(0.25, 0.0, 3, 19), (0.0, 0.25, 40, 4)])
def test_what_does_not_fit_is_left_out(shards, tmp_path, monkeypatch, batch_s, solve_s, rounds, solved):
    """A machine that has become slow since the warm-up: a second is left, and no more is taken."""
    trainer, hand = make_trainer(shards, tmp_path, "quant.gptq=on", "quant.gptq.batches=40", *CAPPED), [100.0]
    trainer.clock.elapsed_ms = 59_000.0
    trainer.calibration.cost = Cost(round=batch_s, solve=0.25 if batch_s else 0.0)
    for owner, name, seconds in ((Hessians, "add", batch_s), (Calibration, "solve", solve_s)):
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), seconds, hand))
    monkeypatch.setattr(calibrate, "Deadline", partial(calibrate.Deadline, now=lambda: hand[0]))
    given = trainer.calibration.run()
    facts = trainer.calibration.facts
    assert facts["seconds"] <= 1.0 and facts["rounds"] == rounds and len(given) == solved
    said = (tmp_path / "train.log").read_text()
    assert ("rounds of calibration batches" in said) == (rounds < 40)
    assert ("which are rounded plainly" in said) == (solved < 19)


def slowed(work, seconds, hand):
    """`work`, after which the clock `hand` has moved on."""

    def slow(*args):
        hand[0] += seconds
        return work(*args)

    return slow


def test_no_time_at_all_leaves_plain_rounding(shards, tmp_path):
    trainer = make_trainer(shards, tmp_path, *GPTQ, *EGGROLL, *CAPPED)
    trainer.clock.elapsed_ms = 61_000.0
    assert trainer.calibration.run() == {} and trainer.calibration.facts["rounds"] == 0
    assert "eggroll" not in trainer.calibration.facts
    said = (tmp_path / "train.log").read_text()
    assert "time for 0 of 6 rounds" in said and "no time for EGGROLL" in said


def test_a_run_resumed_behind_its_training_calibrates_again(shards, tmp_path):
    """The checkpoint is written before: the same bytes; and no step is made although the new reserve is shorter."""
    more = (*GPTQ, *EGGROLL, "train.max_wallclock_seconds=40", "train.reserve_ms=0", "quant.eggroll.seconds=8")
    run(settings(shards, tmp_path, *SHORT, *more, "train.run_id=r"))
    path = tmp_path / "r"
    first, facts = (path / "model.pgolf").read_bytes(), last(path)[1]
    assert facts["reserve_ms"] > 8000 and "calibrate" not in facts["ledger"]
    for name in ("model.pgolf", "result.json"):
        (path / name).unlink()
    result = run(settings(shards, tmp_path, *SHORT, *more, "train.run_id=r", "train.resume=auto"))
    assert result["steps"] == 6 and result["resumes"] == 1
    assert (path / "model.pgolf").read_bytes() == first
    assert result["calibration"]["reserve_seconds"] >= facts["reserve_ms"] / 1000


# -- EGGROLL -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), GPTQ])
def test_eggroll_in_a_run(shards, tmp_path, plain, more):
    """What it keeps is in the artifact; it reports a slice of the stream that did not decide."""
    result = run(settings(shards, tmp_path, *SHORT, *more, *EGGROLL))
    facts = result["calibration"]["eggroll"]
    assert facts["trials"] == 12 and 0 < facts["kept"] <= 12 and facts["loss"][1] < facts["loss"][0]
    assert facts["control"][0] != facts["loss"][0]
    records = records_of(tmp_path)
    tables = [n for n in plain if plain[n] != records[n] and plain[n].role == "embed"]
    assert (records != plain) and all(records[n].kind == plain[n].kind for n in plain)
    assert more or sum(plain[n] != records[n] for n in plain) <= facts["kept"]
    assert all(abs(records[n].parts["q"].astype(int) - plain[n].parts["q"]).max() <= 1 for n in tables)
    assert f"eggroll: {facts['kept']} of 12 trials kept" in text(only_run(tmp_path))


@pytest.mark.alone
def test_eggroll_has_its_seconds_and_no_more(shards, tmp_path):
    trainer = make_trainer(shards, tmp_path, "quant.eggroll=on", "quant.eggroll.seconds=0.5", *CAPPED)
    trainer.calibration.keep_reserve()
    assert trainer.reserve_ms > 500
    trainer.calibration.run()
    assert 0.4 < trainer.calibration.facts["seconds"] < 1.0 and trainer.calibration.facts["eggroll"]["trials"] > 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("quant.gptq=on", "quant.matrix=fp16", "quant.late_qat=none"), "gptq rounds matrices to integers"),
        (("quant.eggroll=on", "quant.matrix=fp16", "quant.embed=float", "quant.late_qat=none"), "eggroll changes"),
        (("quant.eggroll=on", "train.max_wallclock_seconds=15"), "below half of the training time"),
        (("quant.gptq.damp=0.1",), "quant.gptq is off; add quant.gptq=on first"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(shards, tmp_path, argv, said):
    with pytest.raises(config.ConfigError, match=said):
        settings(shards, tmp_path, *argv)


# -- ranks -------------------------------------------------------------------------------------------------------------


def _calibrated(world, rank, port, chosen, out):
    """{name: sha256 of the integers}, the Hessians' digits and what EGGROLL did, of one rank of a fresh model."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    dist = start("cpu")
    trainer = Trainer(chosen.config, dist, RunLog(out, rank, console=False), TimeLedger())
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in trainer.model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=gen))
    given = trainer.calibration.run()
    hessians, _, tokens = trainer.calibration.collect()
    hessians.reduce_(dist)
    sums = {name: hessians.of(name).tolist() for name in trainer.calibration.names}
    dist.close()
    digests = {name: hashlib.sha256(parts["q"].tobytes()).hexdigest() for name, parts in given.items()}
    return digests, sums, tokens, trainer.calibration.facts["eggroll"]


def _rank(queue, *args):
    try:
        queue.put((args[1], _calibrated(*args)))
        queue.close()
        queue.join_thread()
    except Exception:
        queue.put((args[1], traceback.format_exc()))


def together(world, chosen, out):
    """What each of `world` ranks found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    args = [(queue, world, r, port, chosen, out / str(r)) for r in range(world)]
    processes = [context.Process(target=_rank, args=a) for a in args]
    [p.start() for p in processes]
    try:
        got = dict(queue.get(timeout=120) for _ in range(world))
    finally:
        [p.join(10) for p in processes]
        [p.kill() for p in processes if p.is_alive()]
    assert all(isinstance(value, tuple) for value in got.values()), got
    return [got[r] for r in range(world)]


@pytest.mark.dist
def test_one_rank_and_two_see_the_same(shards, tmp_path):
    """The same Hessians up to fp32's sums, and every rank with the same integers, whichever rank made them."""
    chosen = settings(shards, tmp_path, *GPTQ, *EGGROLL)
    (one,), two = together(1, chosen, tmp_path / "one"), together(2, chosen, tmp_path / "two")
    assert one[2] == two[0][2] == two[1][2] == 6 * 256
    for name, h in one[1].items():
        for other in two:
            torch.testing.assert_close(torch.tensor(other[1][name]), torch.tensor(h), rtol=1e-4, atol=1e-7)
    assert two[0][0] == two[1][0] and two[0][3] == two[1][3] and len(two[0][0]) == 22
    assert two[0][3]["kept"] > 0
