"""A good folder passes; each of many broken ones is refused by the rule that it breaks, and by its name."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from breaking import as_record, both, edit, edit_json, remove, write

from pgolf import __main__
from pgolf.submit import check
from pgolf.submit.folder import open_folder
from pgolf.submit.rules import FAIL, OK, SKIP, WARN, Rule, run


def examine(folder):
    return {r.id: r for r in check.examine(open_folder(folder))}


def failed(found):
    return {name for name, r in found.items() if r.status == FAIL}


def test_a_good_folder_passes(good):
    found = examine(good)
    assert not failed(found), [found[n] for n in failed(found)]
    assert found.keys() == check.RULES.keys() and check.exit_code(list(found.values())) == 0
    unknown = {n for n, r in found.items() if r.status == SKIP}
    assert unknown == {"PG022", "PG031", "PG121", "PG141", "PG205"}
    assert all(found[n].what.startswith("not checked: ") for n in unknown)
    assert {n for n, r in found.items() if r.status == WARN} == {"PG062", "PG101", "PG191"}, "no record, and no claim"


def test_a_proven_byte_sidecar_is_said(folder):
    for log in folder.glob("train_seed*.log"):
        log.write_text("byte sidecar: 151,080,645 bytes in 50,000 documents, each\n" + log.read_text())
    found = examine(folder)["PG081"]
    assert found.status == OK and "proved its byte sidecar" in found.what


def test_a_good_record_passes(folder):
    found = examine(as_record(folder))
    assert not failed(found), [found[n] for n in failed(found)]
    assert found["PG062"].status == found["PG101"].status == OK


def seeds(which):
    return lambda old: {k: v for k, v in old.items() if k in which}


def over_in_a_log(folder):
    total = 15_990_000 + (folder / "train_gpt.py").stat().st_size
    edit("train_seed2.log", r"^(Serialized model \S+:) \d+", r"\1 15990000")(folder)
    edit("train_seed2.log", r"^(Total submission size \S+:) \d+", rf"\1 {total}")(folder)
    edit_json(seed_results__2__artifact_bytes=total)(folder)


def audited(folder, **status):
    """A report that claims to be of the folder's script."""
    digest = json.loads((folder / "train_gpt_manifest.json").read_text())["sha256"]
    tests = dict.fromkeys(("substitution", "future", "noise", "prefix", "controls", "ledger"), "passed") | status
    told = {"passed": True, "code_sha256": digest, "scorer": "toy"}
    return json.dumps(told | {"tests": {name: {"status": s} for name, s in tests.items()}})


BROKEN = {
    # files
    "no README": (remove("README.md"), "PG201", 9),
    "no submission.json": (remove("submission.json"), "PG171", 9),
    "no script": (remove("train_gpt.py"), "PG021", 9),
    "an empty script": (write("train_gpt.py", b""), "PG201", 9),
    "a script that is cut": (lambda f: os.truncate(f / "train_gpt.py", 50_000), "PG021", 9),
    "a script of other bytes": (edit("train_gpt.py", "prefix=\"pgolf-\"", "prefix=\"other-\""), "PG024", 9),
    "a script with more after it": (edit("train_gpt.py", r"\Z", "print(1)\n", 1), "PG012", 9),
    "no manifest": (remove("train_gpt_manifest.json"), "PG024", 9),
    "a manifest of another script": (edit("train_gpt_manifest.json", r'"sha256": "..', '"sha256": "00', 1), "PG024", 9),
    "a twin that is not the source": (edit("train_gpt_readable.py", "def main", "def mein"), "PG024", 9),
    "no twin": (remove("train_gpt_readable.py"), "PG024", 9),
    "an absolute path": (edit("README.md", "## Results", "## Results in /home/thor/runs/7"), "PG202", 9),
    "a Windows path": (edit_json(blurb="C:\\Users\\thor"), "PG202", 9),
    "a token in a log": (edit("train_seed1.log", r"\A", f"login with hf_{'a1B2' * 9}\n"), "PG203", 9),
    "a key in a script beside": (write("run.sh", f"export WANDB_API_KEY={'0f' * 20}\n"), "PG203", 9),
    "weights": (write("model.pgolf", b"PGLF"), "PG204", 9),
    "a binary": (write("tool", b"\x7fELF\0\0"), "PG204", 9),
    "an archive": (write("code.zip", b"PK\x03\x04"), "PG204", 9),
    "a link": (lambda f: (f / "log.txt").symlink_to("/etc/hostname"), "PG204", 9),
    # submission.json
    "no JSON": (write("submission.json", "{'author': 'x'}"), "PG171", 9),
    "NaN": (edit("submission.json", r'"val_bpb": [\d.]+', '"val_bpb": NaN', 1), "PG171", 9),
    "a name twice": (edit("submission.json", r"\A\{", '{"val_bpb": 1.0,'), "PG171", 9),
    "a list": (write("submission.json", "[]"), "PG171", 9),
    "no author": (edit_json(author=None), "PG172", 9),
    "a score that is a text": (edit_json(val_bpb="1.12"), "PG172", 9),
    "a date that does not exist": (edit_json(date="2026-02-30"), "PG172", 9),
    "bytes in MB": (edit_json(bytes_total=15.9), "PG172", 9),
    "a negative score": (edit_json(seed_results__1__val_bpb=-1.0), "PG172", 9),
    "the best seed for the mean": (edit_json(val_bpb=lambda v: v - 0.012), "PG173", 9),
    "a rounded-up claim": (edit_json(val_bpb=lambda v: round(v, 5) - 0.00002), "PG173", 9),
    "a spread of its own": (edit_json(val_bpb_std=0.0005), "PG174", 9),
    "bytes that do not add up": (edit_json(bytes_code=1000), "PG175", 9),
    "scores of other seeds": (edit_json(seeds=[1, 2, 4]), "PG176", 9),
    "a seed twice": (edit_json(seeds=[1, 2, 2]), "PG172", 9),
    "tuned on validation": (edit_json(hyperparameters_tuned_on="val"), "PG151", 9),
    "no word on tuning": (edit_json(hyperparameters_tuned_on=None), "PG151", 9),
    "calibrated on validation": (edit_json(calibration="validation"), "PG161", 9),
    "a p that is not": (edit_json(comparison__p_value=1e-6), "PG191", 9),
    "a comparison without its scores": (edit_json(comparison__baseline_val_bpb=None), "PG191", 9),
    "too good to be true": (edit_json(comparison__baseline_val_bpb=lambda v: [x + 0.1 for x in v]), "PG211", 9),
    "an audit that failed": (write("audit.json", '{"passed": false}'), "PG121", 9),
    "an audit that says passed of a failed test": (
        lambda f: write("audit.json", audited(f, noise="failed"))(f), "PG121", 9),
    "an audit without noise behind a jump": (
        both(edit_json(comparison__baseline_val_bpb=lambda v: [x + 0.1 for x in v]),
             lambda f: write("audit.json", audited(f, noise="skipped"))(f)), "PG211", 9),
    "an audit of other code": (write("audit.json", '{"passed": true, "code_sha256": "00"}'), "PG121", 9),
    # bytes
    "over the limit in a log": (over_in_a_log, "PG011", 5),
    "over the limit by its claim": (
        both(edit_json(bytes_total=lambda v: 16_000_001, bytes_model=lambda v: 16_000_001 - 95_000, bytes_code=95_000)),
        "PG011", 5),
    "a helper that was not counted": (
        both(edit("train_gpt.py", r"\Z", "import helper\n", 1), write("helper.py", "x = 1\n" * 100)), "PG012", 9),
    # runs
    "no logs": (lambda f: [p.unlink() for p in f.glob("*.log")], "PG181", 9),
    "a log is missing": (remove("train_seed2.log"), "PG181", 9),
    "a log twice": (lambda f: write("train_seed1_again.log", (f / "train_seed1.log").read_bytes())(f), "PG181", 9),
    "a log that is cut": (edit("train_seed3.log", r"^Serialized model[\s\S]*", ""), "PG182", 9),
    "a log that ends in NaN": (edit("train_seed3.log", r"val_bpb:[\d.]+$", "val_bpb:nan"), "PG182", 9),
    "another score than the log's": (
        both(edit_json(seed_results__1__val_bpb=lambda v: v - 0.003, val_bpb=lambda v: v - 0.001)), "PG183", 9),
    "another size than the log's": (edit_json(seed_results__1__artifact_bytes=99_999), "PG184", 9),
    "other settings in one run": (edit("train_seed2.log", r"settings_digest:....", "settings_digest:0000"), "PG051", 9),
    "other code in one run": (edit("train_seed2.log", r"code_sha256:....", "code_sha256:0000"), "PG052", 9),
    "no word on code": (edit("train_seed2.log", r"^evidence code_sha256.*$", ""), "PG052", 9),
    "a part of the targets": (edit("train_seed2.log", r" targets:\d+", " targets:1024"), "PG061", 9),
    "bytes of another tokenizer": (
        both(edit("train_seed1.log", r"val_loss:\d+\.\d{8}", "val_loss:4.90000000")), "PG063", 9),
    "leaky training shards": (edit("train_seed1.log", r"train_shards:\d+", "train_shards:1499"), "PG102", 9),
    "one seed of other bytes": (edit("train_seed1.log", r"\A", "byte sidecar: 9 bytes in 2 documents\n"), "PG081", 9),
    "a doubled data path": (edit("train_seed1.log", r"\A", "data: data/datasets/datasets/x\n"), "PG102", 9),
    "the unsafe scorer": (edit("train_seed1.log", r"\A", "setting ngram.scorer=legacy_hashed_unsafe [override]\n"),
        "PG132", 9),
    "hashed tables": (
        edit("train_seed1.log", r"\A", "NGRAM_EVAL_BUCKETS=4194304\nfinal_int6_ngram9_exact val_bpb:0.4489\n"),
        "PG132", 9),
    "no BOS": (edit("train_seed1.log", r"val_first_token:1", "val_first_token:77"), "PG111", 9),
}  # fmt: skip
# On the record track only
BROKEN_RECORDS = {
    "over training time": (edit("train_seed2.log", r"^(  = training +)[\d.]+ s", r"\g<1>612.40 s"), "PG041", 5),
    "over evaluation time": (edit("train_seed2.log", r"^(  = evaluation +)[\d.]+ s", r"\g<1>660.10 s"), "PG042", 5),
    "two seeds": (
        both(remove("train_seed3.log"), edit_json(seeds=[1, 2], seed_results=seeds("12"), val_bpb_std=None)),
        "PG176", 9),
    "a short validation split": (edit("train_seed1.log", r"val_documents:50000", "val_documents:41597"), "PG101", 9),
    "too many bytes in the split": (
        edit("train_seed1.log", r"target_bytes:\d+", "target_bytes:157319833"), "PG062", 9),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_name(name, folder):
    break_it, rule, code = BROKEN[name]
    break_it(folder)
    found = examine(folder)
    assert rule in failed(found), f"{rule}: {found[rule]}; failed: {failed(found)}"
    assert check.exit_code(list(found.values())) == code, failed(found)


@pytest.mark.parametrize("name", BROKEN_RECORDS)
def test_a_broken_record_is_refused_by_name(name, folder):
    break_it, rule, code = BROKEN_RECORDS[name]
    folder = as_record(folder)
    break_it(folder)
    found = examine(folder)
    assert rule in failed(found), f"{rule}: {found[rule]}; failed: {failed(found)}"
    assert check.exit_code(list(found.values())) == code, failed(found)


def test_there_are_enough_and_every_rule_that_can_fail_does():
    rules = {rule for _, rule, _ in [*BROKEN.values(), *BROKEN_RECORDS.values()]}
    assert len(BROKEN) + len(BROKEN_RECORDS) >= 60
    # these only warn, or are never decided by a folder
    assert check.RULES.keys() - rules == {
        "PG013",
        "PG022",
        "PG023",
        "PG031",
        "PG071",
        "PG131",
        "PG141",
        "PG205",
    }


@pytest.mark.parametrize("order, status", [("stream", "ok"), ("length_sorted:0123456789abcdef", "warn"), ("", "skip")])
def test_an_adapting_run_shows_its_ledger(order, status, folder):
    """By a digest in the log, which only a ledger without faults gets; a log without one proves nothing."""
    row = f"order:{order} ledger_digest:{'ab' * 32}" if order else "nothing"
    for log in folder.glob("*.log"):
        text = re.sub(r"^evidence score_pass:.*$", f"evidence score_pass:ttt val_bpb_final:1.5 {row}", log.read_text(),
                      flags=re.M)  # fmt: skip
        log.write_text(text)
    found = examine(folder)["PG131"]
    assert found.status == status, found


def test_what_an_audit_settles(good, tmp_path):
    """A whole report is ok, one that leaves out what every scorer can be put to warns; a ledger settles the order."""
    results = {}
    for name, status in (("whole", {}), ("part", {"noise": "skipped"})):
        folder = shutil.copytree(good, tmp_path / name)
        (folder / "audit.json").write_text(audited(folder, **status))
        log = folder / "train_seed1.log"
        log.write_text("legal_ttt: chunk 1\n" + log.read_text())
        results[name] = {r.id: r.status for r in check.examine(open_folder(folder))}
    assert results["whole"]["PG121"] == "ok" and results["part"]["PG121"] == "warn"
    assert results["whole"]["PG131"] == "ok"


def test_the_page_has_every_rule_and_no_other(root):
    ids = re.findall(r"^\| (PG\d{3}) \|", (root / "docs/submission.md").read_text(), re.M)
    assert ids == list(check.RULES)


WARNED = {
    "little room": (edit("train_seed1.log", r"^(Total submission size \S+:) \d+", r"\1 15995000"), "PG011"),
    "an unknown package": (edit("train_gpt.py", r"\Z", "import mystery_package\n", 1), "PG023"),
    "std by n": (edit_json(val_bpb_std=lambda v: v * (2 / 3) ** 0.5), "PG174"),
    "a README of a line": (write("README.md", "It is good.\n"), "PG201"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_odd_is_warned_of(name, folder):
    break_it, rule = WARNED[name]
    break_it(folder)
    assert examine(folder)[rule].status == WARN


def test_a_failure_of_a_budget_and_of_something_else_is_9(folder):
    BROKEN["over the limit in a log"][0](folder)
    remove("README.md")(folder)
    assert check.exit_code(list(examine(folder).values())) == 9


# -- other people's folders ----------------------------------------------------------------------------------------


FOREIGN_LOG = """\
seed: 1337
train_shards: 80
val_tokens: 62021632
step:7000/20000 train_loss:1.9 train_time:599000ms step_avg:85.57ms
stopping_early: wallclock_cap train_time:600010ms step:7012/20000
Serialized model int6+lzma: 15900123 bytes
Code size: 67000 bytes
Total submission size int6+lzma: 15967123 bytes
final_int6_sliding_window val_loss:1.8898 val_bpb:1.1193 stride:64 eval_time:97000ms
final_int6_sliding_window_exact val_loss:1.88984512 val_bpb:1.11928104
"""


def foreign(path, **changes):
    path.mkdir(parents=True)
    told = {"author": "X", "github_id": "x", "name": "XSA", "date": "2026-03-27", "val_bpb": 1.1193, "seeds": [1337],
            "blurb": "...", "bytes_total": 15967123, **changes}  # fmt: skip
    (path / "submission.json").write_text(json.dumps(told))
    (path / "README.md").write_text("# XSA\n" + "Some words on the method and how it was run. " * 10)
    (path / "train_seed1337.log").write_text(FOREIGN_LOG)
    script = "import torch\n" + "x = 1  # padding\n" * 3941
    (path / "train_gpt.py").write_text(script[: 67000 - 1] + "\n")
    return path


def test_anybodys_folder_is_checked_as_far_as_it_goes(tmp_path):
    found = examine(foreign(tmp_path / "track_non_record_16mb" / "x"))
    assert not failed(found), [found[n] for n in failed(found)]
    for rule in ("PG011", "PG012", "PG021", "PG041", "PG042", "PG062", "PG102", "PG171", "PG172", "PG181", "PG201"):
        assert found[rule].status == OK, found[rule]
    for rule in ("PG024", "PG051", "PG052", "PG061", "PG071", "PG111", "PG121", "PG151", "PG183", "PG191"):
        assert found[rule].status == SKIP and len(found[rule].what) > 20, found[rule]
    assert "sp1024" in found["PG062"].what
    assert found["PG041"].what.startswith("training took at most 600.0 s")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"bytes_total": None, "artifact_bytes": 16_024_793}, "PG011"),  # another's name for it
        ({"seeds": {"1337": {"val_bpb": 1.1193, "total_bytes": 16_000_001}}, "bytes_total": None}, "PG011"),
        ({"val_bpb": 1.05, "seed_results": {"seed_1337": {"val_bpb": 1.05}}}, "PG183"),
        ({"seed_results": [{"seed": 1337, "val_bpb": "1.1"}]}, "PG172"),
        ({"val_docs": 10_000}, "PG101"),
    ],
)
def test_anybodys_faults_are_named_under_other_names(changes, rule, tmp_path):
    assert rule in failed(examine(foreign(tmp_path / "track_10min_16mb" / "x", **changes)))


def test_what_a_helper_weighs_counts(tmp_path):
    """A script that opened a second, uncounted file once hid 55 KB."""
    folder = foreign(tmp_path / "x")
    script = (folder / "train_gpt.py").read_text()
    (folder / "train_gpt.py").write_text("exec(open('more.py').read())\n" + script[:-40] + "\n")
    (folder / "more.py").write_text("x = 1\n" * 20_000)
    found = examine(folder)
    assert "PG011" in failed(found) and found["PG012"].status == WARN and "more.py" in found["PG012"].what


# -- the command ---------------------------------------------------------------------------------------------------


def test_json_has_what_the_table_has(good, capsys):
    assert check.main([str(good)], {}) == 0
    text = capsys.readouterr().out
    assert check.main([str(good), "--json"], {}) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True and told["exit_code"] == 0 and told["track"] == "non-record"
    assert [r["id"] for r in told["rules"]] == sorted(check.RULES)
    assert all(r["id"] in text for r in told["rules"]) and "33 ok, 3 warn, 0 fail, 5 not checked" not in told
    assert check.main([str(good), "-q"], {}) == 0
    assert "PG011" not in capsys.readouterr().out


def test_exit_codes_of_the_process(folder, tmp_path, capsys):
    BROKEN["over the limit in a log"][0](folder)
    assert __main__.main(["check", str(folder)], {}) == 5
    assert __main__.main(["check", str(tmp_path / "nothing")], {}) == 9
    assert "is not a folder" in capsys.readouterr().err


def test_a_rule_that_raises_does_not_pass_for_a_good_folder(good):
    (found,) = run({"PG999": Rule("x", lambda f: 1 / 0)}, open_folder(good))
    assert found.status == WARN and "ZeroDivisionError" in found.what


@pytest.mark.parametrize("command", ["check", "submit", "bundle", "unbundle"])
def test_help_needs_no_torch(command):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from pgolf.__main__ import dispatch\n"
        f"dispatch([{command!r}, '--help'], {{}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: pgolf" in done.stdout, done.stderr


def test_check_runs_without_torch(good):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        f"from pgolf.__main__ import dispatch; sys.exit(dispatch(['check', {str(good)!r}], {{}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "0 fail" in done.stdout, done.stderr


@pytest.mark.slow
def test_run_trains_packs_and_scores_alone_without_network(good, folder, capsys):
    """The counted script in an empty folder; then one that asks for the network, and one that fails."""
    assert check.main([str(good), "--run", "--json"], {}) == 0
    rules = {r["id"]: r for r in json.loads(capsys.readouterr().out)["rules"]}
    assert rules["PG022"]["status"] == OK and "trains, packs and scores" in rules["PG022"]["what"]
    write("train_gpt.py", "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=3)\n")(folder)
    assert check.main([str(folder), "--run"], {}) == 9
    assert "asks for the network" in " ".join(capsys.readouterr().out.split())
    write("train_gpt.py", "raise ValueError('broken at import')\n")(folder)
    check.main([str(folder), "--run"], {})
    assert "broken at import" in " ".join(capsys.readouterr().out.split())
