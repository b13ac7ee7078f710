"""Rules on what submission.json says, and whether it agrees with itself."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from pgolf.submit import stats
from pgolf.submit.folder import AUDIT, Folder
from pgolf.submit.record import NAME, REQUIRED
from pgolf.submit.rules import Finding, Rule, fail, ok, record_only, skip, warn

NO_RECORD = f"{NAME} cannot be read, see PG171"
SEEDS = 3
TUNED_ON = ("train", "nothing")  # held-out training text, or settings taken as they were
NEEDED = ("substitution", "future", "noise", "prefix", "controls")  # tests of an audit that every scorer can be put to
JUMP = 0.02  # bits per byte: more than any record gained over the one before it without a mistake


def readable(f: Folder) -> Finding:
    return ok(f"{NAME} is a JSON object") if f.record else fail(f.record_error)


def fields(f: Folder) -> Finding:
    if not f.record:
        return skip(NO_RECORD)
    bad = [f"{path}: {what}" for path, what in f.record.problems]
    return fail("; ".join(bad)) if bad else ok(f"{', '.join(REQUIRED)} are there, and known fields have their types")


def mean(f: Folder) -> Finding:
    if not f.record or f.record.val_bpb is None:
        return skip(NO_RECORD if not f.record else "val_bpb is missing, see PG172")
    scores = _scores(f)
    if not scores:
        return skip(f"{NAME} has no scores by seed")
    told, found = f.record.val_bpb, fmean(scores)
    digits = _half_a_digit(told)
    if abs(told - found) > digits:
        return fail(f"val_bpb is {told}, the mean of {len(scores)} seeds is {found:.8f}", "give the mean of the seeds")
    return ok(f"val_bpb {told} is the mean of {len(scores)} seeds")


def _half_a_digit(told: float) -> float:
    """What rounding may do: half a unit of the fifth decimal, or of the last one that is given where fewer are."""
    decimals = min(len(repr(told).partition(".")[2]), 5)
    return 0.5001 * 10.0 ** -max(decimals, 4)


def spread(f: Folder) -> Finding:
    if not f.record or f.record.val_bpb_std is None:
        return skip(NO_RECORD if not f.record else "no val_bpb_std is given")
    scores = _scores(f)
    if len(scores) < 2:
        return skip(f"{NAME} has the scores of {len(scores)} seeds")
    told, found = f.record.val_bpb_std, stdev(scores)
    population = found * math.sqrt((len(scores) - 1) / len(scores))
    if abs(told - found) <= 1e-5 + 0.01 * found:
        return ok(f"val_bpb_std {told:g} is that of {len(scores)} seeds")
    if abs(told - population) <= 1e-5 + 0.01 * found:
        return warn(f"val_bpb_std {told:g} divides by n; by n-1, which a test needs, it is {found:.6f}")
    return fail(f"val_bpb_std is {told:g}, that of {len(scores)} seeds is {found:.6f}")


def total(f: Folder) -> Finding:
    r = f.record
    if not r or None in (r.bytes_total, r.bytes_code, r.bytes_model):
        return skip(NO_RECORD if not r else "bytes_total, bytes_code and bytes_model are not all given")
    if r.bytes_total != r.bytes_code + r.bytes_model:
        return fail(f"bytes_total is {r.bytes_total:,}, code {r.bytes_code:,} + model {r.bytes_model:,} are not")
    return ok(f"{r.bytes_code:,} bytes of code + {r.bytes_model:,} of model are {r.bytes_total:,}")


def seeds(f: Folder) -> Finding:
    if not f.record:
        return skip(NO_RECORD)
    listed, scored = f.record.seeds, list(f.record.seed_results)
    if not listed:
        return record_only(f, f"{NAME} names no seeds")
    if scored and sorted(listed) != sorted(scored):
        return fail(f"$.seeds has {_names(listed)}, the scores are of {_names(scored)}")
    if len(listed) < SEEDS:
        return record_only(f, f"{len(listed)} seeds, a record needs {SEEDS}", "train the missing seeds")
    return ok(f"{len(listed)} seeds: {_names(listed)}")


def _names(seeds: list[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def _scores(f: Folder) -> list[float]:
    return [s.val_bpb for s in f.record.seed_results.values() if s.val_bpb is not None]


def tuned_on(f: Folder) -> Finding:
    if not f.record:
        return skip(NO_RECORD)
    told = f.record.raw.get("hyperparameters_tuned_on")
    if told is None:
        return fail("hyperparameters_tuned_on is missing") if f.is_ours else skip("the authors do not say")
    if told not in TUNED_ON:
        return fail(f"hyperparameters_tuned_on is {str(told)[:60]!r}, expected {' or '.join(TUNED_ON)}")
    return ok(f"hyper-parameters were tuned on: {told}")


def calibration(f: Folder) -> Finding:
    told = f.record.raw.get("calibration") if f.record else None
    told = told.get("source") if isinstance(told, dict) else told
    sources = {str(told).lower()} if told is not None else {log.calibrated_on for log in f.logs if log.calibrated_on}
    if not sources:
        return skip("neither submission.json nor the logs say what calibration read")
    if bad := [s for s in sources if "val" in s.replace("self", "")]:
        return fail(f"calibration read {', '.join(bad)}", "calibrate on training data or on text of the model's own")
    return ok(f"calibration: {', '.join(sorted(sources))}")


def audit(f: Folder) -> Finding:
    if f.audit_error:
        missing = AUDIT not in f.files
        return (
            skip("no audit.json: nothing here shows that the scorer is causal and normalised")
            if missing
            else fail(f.audit_error)
        )
    if f.audit.get("passed") is not True:
        return fail(f"{AUDIT}: passed is {f.audit.get('passed')!r}")
    if not f.manifest or f.audit.get("code_sha256") != f.manifest.get("sha256"):
        return fail(f"{AUDIT} is of other code: its code_sha256 is not the script's")
    if bad := [name for name in f.audit_tests if f.audit_status(name) not in ("passed", "skipped")]:
        return fail(f"{AUDIT}: passed is true, but not the test {', '.join(bad)}")
    of = f"the audit of this script passed, of the scorer {str(f.audit.get('scorer', 'without a name'))[:80]}"
    if missing := [name for name in NEEDED if f.audit_status(name) != "passed"]:
        return warn(f"{of}, but without the test {', '.join(missing)}", "python -m pgolf audit NAME --json FILE")
    return ok(of)


def comparison(f: Folder) -> Finding:
    told = f.record.raw.get("comparison") if f.record else None
    if not isinstance(told, dict):
        return skip(f"{NAME} compares with nothing")
    try:
        new, baseline = _scores(f), [float(x) for x in told["baseline_val_bpb"]]
        factor = float(told["nats_per_token_of_bpb"])
        found = stats.compare(new, baseline, str(told["baseline"])[:60], factor)
        p = float(told["p_value"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as err:
        return fail(f"$.comparison cannot be done again: {type(err).__name__}: {err}")
    again = found.tests[1].p
    if not math.isclose(p, again, rel_tol=0.02, abs_tol=1e-9):
        return fail(f"$.comparison.p_value is {p:g}; done again it is {again:g}")
    gain = f"{found.gain_bpb:+.5f} bits per byte, {found.gain_nats_per_token:+.5f} nats per token over {found.baseline}"
    if not found.significant:
        return warn(f"{gain}: p = {again:.2g} for {stats.NATS:g} nats, a record needs p < {stats.P:g}")
    return ok(f"{gain}: p = {again:.2g} for {stats.NATS:g} nats")


def plausible(f: Folder) -> Finding:
    r = f.record
    told = r.raw.get("comparison") if r else None
    base = told.get("baseline_val_bpb") if isinstance(told, dict) else r and [r.raw.get("comparison_baseline_bpb")]
    base = [x for x in base or () if isinstance(x, (int, float)) and not isinstance(x, bool)]
    if not r or r.val_bpb is None or not base:
        return skip("there is no baseline to compare with")
    gain = fmean(base) - r.val_bpb
    if gain > JUMP and not (f.audit and f.audit.get("passed") is True and f.audit_status("noise") == "passed"):
        return fail(
            f"{gain:.4f} bits per byte better than its baseline, without an audit of the scorer on noise",
            "such a jump was a mistake in most cases: show that noise scores like noise (--audit)",
        )
    return ok(f"{gain:+.4f} bits per byte against its baseline" + (", audited" if gain > JUMP else ""))


RULES = {
    "PG121": Rule("an audit of the scorer passed", audit),
    "PG151": Rule("no hyper-parameter was tuned on validation", tuned_on),
    "PG161": Rule("calibration read no validation data", calibration),
    "PG171": Rule("submission.json is JSON", readable),
    "PG172": Rule("submission.json has its fields", fields),
    "PG173": Rule("val_bpb is the mean of the seeds", mean),
    "PG174": Rule("val_bpb_std is that of the seeds", spread),
    "PG175": Rule("bytes add up", total),
    "PG176": Rule("three seeds, named alike", seeds),
    "PG191": Rule("better by 0.005 nats, p < 0.01", comparison),
    "PG211": Rule("the gain is plausible", plausible),
}
