"""Rules on the runs: bytes, time, seeds, what was scored, and whether logs and submission.json tell the same."""

from __future__ import annotations

import re

from pgolf.data.official import DOCUMENTS, NORMALISED_BYTES, OFFICIAL, leak_mark
from pgolf.result import LIMIT
from pgolf.submit.folder import Folder
from pgolf.submit.record import NAME
from pgolf.submit.rules import Finding, Rule, fail, ok, record_only, skip, warn

SECONDS = 600.0
HEADROOM = 10_000  # bytes; sizes differ from seed to seed by more than this
# bytes per token of the validation split in published exports: what val_loss / (val_bpb ln 2) comes to
EXPORTS = {export.name: export.bytes_per_token for export in OFFICIAL}
NEAR = 1e-4  # truncation to whole sequences takes half of it
NO_LOGS = "the folder has no log of a run, see PG181"
# what a log of the challenge has, and the pattern that finds it
LINES = {
    "step:i/N ... train_time": r"^step:\d+/\d+ .*train_time:",
    "val_loss and val_bpb": r"val_loss:\s*\S+ val_bpb:",
    "a final score": r"(?:final_|_exact|quantized|post-|ttt)\S*.*val_bpb:",
    "Serialized model": r"^Serialized model.*\d+ bytes",
    "Code size": r"^Code size.*\d+ bytes",
    "Total submission size": r"^Total submission size.*\d+ bytes",
}


# -- bytes -----------------------------------------------------------------------------------------------------------


def model_sizes(f: Folder) -> dict[str, int]:
    """Bytes of the compressed model by log, or by seed where only submission.json tells."""
    sizes = {log.name: log.model_bytes for log in f.logs if log.model_bytes}
    if not sizes and f.record:
        code = f.record.bytes_code or 0
        seeds = f.record.seed_results.items()
        sizes = {f"seed {n}": s.artifact_bytes - code for n, s in seeds if (s.artifact_bytes or 0) > code}
        if not sizes and f.record.bytes_total:
            sizes = {NAME: f.record.bytes_total - code}
    return sizes


def limit(f: Folder) -> Finding:
    """Code as it lies here and the largest model; what the files say themselves may not be over either."""
    sizes, code = model_sizes(f), f.code_bytes()
    stated = [log.total_bytes for log in f.logs if log.total_bytes]
    if f.record:
        stated += [f.record.bytes_total or 0, *(s.artifact_bytes or 0 for s in f.record.seed_results.values())]
    if not sizes and not any(stated):
        return skip("neither a log nor submission.json states the model's bytes")
    where, model = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    total = max([model + (code or 0) if sizes else 0, *stated])
    what = f"{total:,} bytes of {LIMIT:,}" + (f" (code {code:,}, model {model:,} in {where})" if code and sizes else "")
    if total > LIMIT:
        return fail(f"{what}: {total - LIMIT:,} too many", "MiB do not count: the limit is decimal")
    if total > LIMIT - HEADROOM:
        return warn(f"{what}: {LIMIT - total:,} left, and sizes differ from seed to seed")
    return ok(what)


def code_counted(f: Folder) -> Finding:
    shipped = f.code_bytes()
    counted = {log.code_bytes for log in f.logs if log.code_bytes} or {(f.record and f.record.bytes_code) or None}
    counted.discard(None)
    if shipped is None or not counted:
        return skip(f.script_error or "no log and no bytes_code says what was counted as code")
    helpers = f" with {', '.join(f.helpers)}" if f.helpers else ""
    if counted != {shipped}:
        told = ", ".join(f"{n:,}" for n in sorted(counted))
        what = f"the shipped code has {shipped:,} bytes{helpers}, {told} were counted"
        return fail(what, "ship what was counted") if f.is_ours else warn(what)
    return ok(f"{shipped:,} bytes of code were counted, and ship{helpers}")


def strict(f: Folder) -> Finding:
    sizes, code = model_sizes(f), f.strict_bytes()
    if code is None or not sizes:
        return skip(f.script_error or "no log states the model's bytes")
    total = code + max(sizes.values())
    what = f"unpacked code {code:,} and model {max(sizes.values()):,} bytes make {total:,}"
    return warn(f"{what}, over {LIMIT:,}") if total > LIMIT else ok(what)


# -- time ------------------------------------------------------------------------------------------------------------


def _time(f: Folder, name: str, by_log: dict[str, float], by_seed: dict[str, float]) -> Finding:
    times = by_log or by_seed
    if not times:
        return skip(f"no log and no seed states the seconds of {name}")
    where, most = max(times.items(), key=lambda item: item[1])
    missing = len(f.logs) - len(by_log) if by_log else 0
    what = f"{name} took at most {most:.1f} s of {SECONDS:g} ({where})" + f", {missing} logs do not say" * bool(missing)
    # the step that runs when the cap comes is finished
    if most > SECONDS + (1.0 if name == "training" else 0.0):
        return record_only(f, what, "keep a larger reserve")
    return ok(what)


def training_time(f: Folder) -> Finding:
    by_seed = {f"seed {n}": (s.train_wallclock_ms or 0) / 1000 for n, s in _results(f) if s.train_wallclock_ms}
    return _time(f, "training", {log.name: log.train_seconds for log in f.logs if log.train_seconds}, by_seed)


def evaluation_time(f: Folder) -> Finding:
    by_seed = {f"seed {n}": s.eval_time_s for n, s in _results(f) if s.eval_time_s}
    return _time(f, "evaluation", {log.name: log.eval_seconds for log in f.logs if log.eval_seconds}, by_seed)


def _results(f: Folder) -> list:
    return list(f.record.seed_results.items()) if f.record else []


# -- seeds and code --------------------------------------------------------------------------------------------------


def _same(f: Folder, fact: str, what: str) -> Finding:
    if not f.logs:
        return skip(NO_LOGS)
    values = {log.name: log.facts.get(fact) for log in f.logs}
    if None in values.values():
        missing = [name for name, value in values.items() if value is None]
        return fail(f"{', '.join(missing)} has no {fact}") if f.is_ours else skip(f"the logs have no {fact}")
    if len(set(values.values())) > 1:
        return fail(f"{what} differ: " + ", ".join(f"{n} {v[:12]}" for n, v in values.items()), "run all seeds alike")
    return ok(f"one {fact} in {len(values)} logs: {next(iter(values.values()))[:16]}")


def same_settings(f: Folder) -> Finding:
    return _same(f, "settings_digest", "settings")


def same_code(f: Folder) -> Finding:
    found = _same(f, "code_sha256", "scripts")
    if found.status != "ok" or not f.manifest:
        return found
    logged = f.logs[0].facts["code_sha256"]
    return found if f.manifest.get("sha256") == logged else fail(f"the logs are of code {logged[:16]}, not of this one")


# -- what was scored -------------------------------------------------------------------------------------------------


def targets(f: Folder) -> Finding:
    known = [(log, log.number("val_tokens") or log.val_tokens, log.number("targets")) for log in f.logs]
    known = [(log, tokens, scored) for log, tokens, scored in known if tokens and scored]
    if not known:
        return skip("the logs do not say how many targets were scored")
    if bad := [(log, n, t) for log, n, t in known if t != n - 1]:
        log, n, scored = bad[0]
        return fail(f"{log.name}: {scored:,} targets were scored, the split has {n - 1:,}", "score the whole split")
    return ok(f"all {known[0][2]:,} targets of the split were scored, each once")


def byte_sum(f: Folder) -> Finding:
    """From the logs' own count; else from the two scores, whose ratio is the bytes per token."""
    sums = {log.name: log.number("target_bytes") for log in f.logs if log.number("target_bytes")}
    if sums:
        if bad := {n: s for n, s in sums.items() if abs(s / NORMALISED_BYTES - 1) > NEAR}:
            name, found = next(iter(bad.items()))
            return record_only(f, f"{name}: {found:,} bytes, the official split has {NORMALISED_BYTES:,} within 0.01 %")
        return ok(f"{max(sums.values()):,} bytes, as the official split has")
    ratios = {log.name: log.bytes_per_token for log in f.logs if log.bytes_per_token}
    if not ratios and f.record and f.record.val_loss and f.record.val_bpb:
        ratios = {NAME: f.record.val_loss / (f.record.val_bpb * 0.6931471805599453)}
    if not ratios:
        return skip("no file states val_loss and val_bpb together")
    name, ratio = next(iter(ratios.items()))
    close = [(abs(ratio / known - 1), export) for export, known in EXPORTS.items()]
    apart, export = min(close)
    if apart < 3 * NEAR:
        return ok(f"{ratio:.4f} bytes per token, as in the {export} export")
    return warn(f"{name}: {ratio:.4f} bytes per token is no published export's; the nearest is {export}",
                "show with the tokenizer that the bytes are right")  # fmt: skip


def one_ratio(f: Folder) -> Finding:
    ratios = [log.bytes_per_token for log in f.logs if log.bytes_per_token]
    if len(ratios) < 2:
        return skip("fewer than two logs have a score")
    if max(ratios) / min(ratios) - 1 > NEAR:
        return fail(f"bytes per token differ between seeds: {min(ratios):.5f} to {max(ratios):.5f}",
                    "all seeds must be scored on one split with one tokenizer")  # fmt: skip
    return ok(f"one ratio of bytes to tokens in {len(ratios)} logs: {ratios[0]:.5f}")


def tokenizer(f: Folder) -> Finding:
    proven = [log for log in f.logs if "bytes of all val tokens proven" in log.text]
    if proven and len(proven) == len(f.logs):
        return ok("each run proved the bytes of all val tokens on two paths before its start")
    return skip("the logs do not show that the byte counts were proven")


def transform(f: Folder) -> Finding:
    proven = [log.name for log in f.logs if re.search(r"byte sidecar: [\d,]+ bytes in [\d,]+ documents", log.text)]
    if proven and len(proven) < len(f.logs):
        return fail(f"only {', '.join(proven)} was scored with a byte sidecar", "score all seeds on one export")
    if proven:
        return ok("each run proved its byte sidecar document by document; `pgolf data check --all` turns the text back")
    # a bundle of pgolf names what it does not have; others' scripts use what they name
    scripts = [] if f.is_ours or f.script is None else f.script.files.values()
    if any(re.search(r"caseops|fineweb_val_bytes|byte_sidecar", text, re.I) for text in [*scripts, *_texts(f)]):
        return skip("case operators or a byte sidecar are in use; their round trip needs the data")
    return ok("no text transform and no byte sidecar: bytes come from the tokenizer's pieces")


def _texts(f: Folder) -> list[str]:
    return [log.text for log in f.logs]


ADAPTS = re.compile(r"^evidence score_pass:(?:ttt|ngram)|^(?!setting ).*(?:\bttt\b|\blegal_ttt|phase:adapt|test-time)",
                    re.I | re.M)  # fmt: skip
LEDGER = re.compile(r"^evidence score_pass:(\w+) .*order:(\S+) ledger_digest:([0-9a-f]{64})$", re.M)


def order(f: Folder) -> Finding:
    """A run of pgolf ends without a score when its ledger has an update before a score; so a digest is a proof's."""
    adapting = [log for log in f.logs if ADAPTS.search(log.text)]
    if not adapting:
        return ok("evaluation without adaptation") if f.logs else skip(NO_LOGS)
    name, proofs = adapting[0].name, [LEDGER.search(log.text) for log in adapting]
    if f.is_ours and all(proofs):
        orders = sorted({proof[2] for proof in proofs})
        if any(not order.startswith("stream") for order in orders):
            return warn(
                f"documents are scored in the order {orders[0]}, which uses where the next document begins",
                "whether that is allowed has not been ruled; ttt.order=stream is beyond doubt",
            )
        return ok(f"{name} adapts; its ledger was checked, scores come first (sha256 {proofs[0][3][:16]}...)")
    if f.audit and f.audit.get("passed") is True and f.audit_status("ledger") == "passed":
        return ok(f"{name} adapts during evaluation; the audit's ledger has scores first")
    return skip(f"{name} adapts during evaluation; that scores come first does not show in a log")


UNSAFE = "legacy_hashed_unsafe"
HASHED = re.compile(r"\bNGRAM_EVAL_(?:BUCKETS|ORDER)\b")


def hashed(f: Folder) -> Finding:
    """Hashed n-gram tables sum to hundreds over the vocabulary; scores with them were disallowed as a class (#677)."""
    why = "docs/why_hashed_scores_are_no_code_lengths.md; ngram=on has scorers that are distributions"
    if named := [log.name for log in f.logs if UNSAFE in log.text]:
        return fail(f"{named[0]} scores with {UNSAFE}, whose numbers are no probabilities", why)
    scripts = [] if f.is_ours or f.script is None else f.script.files.values()
    used = [log.name for log in f.logs if re.search(r"^final\w*ngram\w*", log.text, re.M)]
    if used and any(HASHED.search(text) for text in [*scripts, *_texts(f)]):
        return fail(f"{used[0]} has a score with hashed n-gram tables, which is no code length", why)
    return ok("no hashed n-gram tables") if f.logs else skip(NO_LOGS)


def documents(f: Folder) -> Finding:
    counts = {log.number("val_documents") for log in f.logs} - {None}
    if f.record and isinstance(docs := f.record.raw.get("val_docs"), int):
        counts.add(docs)
    if not counts:
        return skip("the logs do not say how many documents the split has")
    if counts != {DOCUMENTS}:
        found = ", ".join(f"{n:,}" for n in sorted(counts))
        return record_only(f, f"the validation split has {found} documents, the official one has {DOCUMENTS:,}")
    return ok(f"{DOCUMENTS:,} validation documents")


def first_token(f: Folder) -> Finding:
    firsts = {log.number("val_first_token") for log in f.logs} - {None}
    if not firsts:
        return skip("the logs do not say what the split begins with")
    return ok("the split begins with BOS") if firsts == {1} else fail(f"the split begins with token {firsts}, not BOS")


def shards(f: Folder) -> Finding:
    """A widely copied script once put 80 % of validation into training; its shards have 10 M tokens."""
    if marks := {leak_mark(text, 0) for text in _texts(f)} - {""}:
        return fail(marks.pop())
    counts = {n for log in f.logs if (n := log.number("train_shards") or log.train_shards)}
    if not counts:
        return skip("the logs do not say how many training shards there were")
    if mark := leak_mark("", max(counts)):
        return fail(mark, "train on a published export")
    return ok(f"{', '.join(map(str, sorted(counts)))} training shards")


# -- logs against submission.json ------------------------------------------------------------------------------------


def a_log_a_seed(f: Folder) -> Finding:
    if not f.logs:
        return fail("no file here looks like a training log", "add the full output of each seed")
    seeds = f.record.seeds if f.record else []
    logged = [log.seed for log in f.logs]
    if doubled := sorted({s for s in logged if s is not None and logged.count(s) > 1}):
        return fail(f"seed {doubled[0]} has {logged.count(doubled[0])} logs")
    if missing := sorted(set(seeds) - set(logged)):
        return fail(f"no log of seed {', '.join(map(str, missing))}", "add the full output of each seed")
    return ok(f"{len(f.logs)} logs: {', '.join(log.name for log in f.logs)}")


def whole_logs(f: Folder) -> Finding:
    if not f.logs:
        return skip(NO_LOGS)
    for log in f.logs:
        if log.non_finite:
            return fail(f"{log.name}: a final score is not finite")
        missing = [name for name, pattern in LINES.items() if not re.search(pattern, log.text, re.M)]
        if missing:
            return fail(
                f"{log.name} has no line with: {', '.join(missing)}", "the log must be the whole output of a run"
            )
    return ok(f"{len(LINES)} kinds of lines are in each log")


def scores_agree(f: Folder) -> Finding:
    pairs = [(log, f.record.seed_results.get(log.seed)) for log in f.logs] if f.record else []
    pairs = [(log, s) for log, s in pairs if s and s.val_bpb and log.val_bpb]
    if not pairs:
        return skip("no seed has its score both in a log and in submission.json")
    for log, told in pairs:
        if not _agree(log.val_bpb, told.val_bpb):
            what = f"{log.name} ends with val_bpb {log.val_bpb}, submission.json has {told.val_bpb}"
            finals = re.findall(r"(?:final|quantized|post|pre|ttt)\S* .*val_bpb:\s*(\d+\.\d+)", log.text)
            another = any(_agree(float(n), told.val_bpb) for n in finals)
            return warn(f"{what}, another of its final scores") if another else fail(what)
        if told.val_loss and log.val_loss and not _agree(log.val_loss, told.val_loss):
            return fail(f"{log.name} ends with val_loss {log.val_loss}, submission.json has {told.val_loss}")
    return ok(f"the scores of {len(pairs)} seeds are those of their logs")


def _agree(a: float, b: float) -> bool:
    return abs(a - b) < 6e-5  # one of them may be rounded to four decimals


def sizes_agree(f: Folder) -> Finding:
    pairs = [(log, f.record.seed_results.get(log.seed)) for log in f.logs] if f.record else []
    pairs = [(log, s) for log, s in pairs if s and s.artifact_bytes and log.total_bytes]
    if not pairs:
        return skip("no seed has its size both in a log and in submission.json")
    for log, told in pairs:
        if told.artifact_bytes not in (log.total_bytes, log.model_bytes):
            return fail(f"{log.name} counts {log.total_bytes:,} bytes, submission.json has {told.artifact_bytes:,}")
        if log.model_bytes and log.code_bytes and log.total_bytes != log.model_bytes + log.code_bytes:
            return fail(f"{log.name}: model {log.model_bytes:,} + code {log.code_bytes:,} are not {log.total_bytes:,}")
    return ok(f"the sizes of {len(pairs)} seeds are those of their logs")


RULES = {
    "PG011": Rule("code and model are within 16,000,000 bytes", limit, budget=True),
    "PG012": Rule("the code that ships is the code that was counted", code_counted),
    "PG013": Rule("within the limit even with unpacked code", strict),
    "PG041": Rule("training within 600 s", training_time, budget=True),
    "PG042": Rule("evaluation within 600 s", evaluation_time, budget=True),
    "PG051": Rule("all seeds ran the same settings", same_settings),
    "PG052": Rule("all seeds ran the script that ships", same_code),
    "PG061": Rule("every target was scored once", targets),
    "PG062": Rule("the split has the official bytes", byte_sum),
    "PG063": Rule("one ratio of bytes to tokens", one_ratio),
    "PG071": Rule("bytes per token are proven", tokenizer),
    "PG081": Rule("a text transform keeps the bytes", transform),
    "PG101": Rule("50,000 validation documents", documents),
    "PG102": Rule("training data hold no validation documents", shards),
    "PG111": Rule("the split begins with BOS", first_token),
    "PG131": Rule("scored before adapted", order),
    "PG132": Rule("no hashed n-gram tables", hashed),
    "PG181": Rule("a log for each seed", a_log_a_seed),
    "PG182": Rule("the logs are whole", whole_logs),
    "PG183": Rule("scores in logs and submission.json agree", scores_agree),
    "PG184": Rule("sizes in logs and submission.json agree", sizes_agree),
}
