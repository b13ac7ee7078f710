"""`pgolf audit`: names, exit codes, report; and that `pgolf check` takes the report."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pgolf import __main__
from pgolf.audit import command, suite
from pgolf.audit.controls import CONTROLS
from pgolf.audit.valid import VALID
from pgolf.data.shards import write_shard
from pgolf.errors import AuditError
from pgolf.submit.folder import Folder
from pgolf.submit.rules_record import audit as pg121


@pytest.fixture
def quick(monkeypatch):
    """The script is that of b"script", and two controls are enough."""
    monkeypatch.setattr(suite, "bundle", lambda: b"script")
    for table in (suite.CONTROLS, command.CONTROLS):
        for name in table.keys() - {"rank_local", "not_neutral"}:
            monkeypatch.delitem(table, name)
    monkeypatch.setattr(suite, "VALID", {"uniform": VALID["uniform"]})
    monkeypatch.setattr(command, "VALID", {"uniform": VALID["uniform"]})


def test_a_report_that_submit_and_check_take(quick, tmp_path, capsys):
    path = tmp_path / "audit.json"
    assert __main__.main(["audit", "uniform", "--quick", "--seed", "3", "--json", str(path)], {}) == 0
    out = capsys.readouterr().out
    told = json.loads(path.read_text())
    assert {"scorer", "config_digest", "code_sha256", "git", "seed", "tests", "ledger_digest", "passed"} <= told.keys()
    assert told["passed"] is True and told["seed"] == 3 and len(told["ledger_digest"]) == 64
    assert list(told["tests"]) == [*suite.TESTS, "controls"]
    for test in told["tests"].values():
        assert {"status", "worst_deviation", "samples", "threshold", "detail"} <= test.keys()
    assert told["skipped"] == ["neutral", "warm_up"] and "passed, not made: neutral, warm_up" in out
    folder = Folder(Path("."), {"audit.json": 1}, [], audit=told)
    folder.manifest = {"sha256": hashlib.sha256(b"script").hexdigest()}
    assert pg121(folder).status == "ok"
    folder.manifest = {"sha256": hashlib.sha256(b"another").hexdigest()}
    assert pg121(folder).status == "fail"


def test_a_scorer_that_fails(quick, tmp_path, capsys):
    path = tmp_path / "audit.json"
    code = __main__.main(["audit", "not_neutral", "--quick", "--no-controls", "--json", str(path)], {})
    assert code == AuditError.exit_code == 10
    assert "failed: neutral" in capsys.readouterr().out
    told = json.loads(path.read_text())
    assert told["passed"] is False and told["tests"]["neutral"]["status"] == "failed"


def test_controls(quick, monkeypatch, tmp_path, capsys):
    path = tmp_path / "controls.json"
    assert command.main(["controls", "--quick", "--json", str(path)], {}) == 0
    assert "all 2 controls are flagged, no false alarm" in capsys.readouterr().out
    assert json.loads(path.read_text())["controls"]["rank_local"]["flagged_by"] == ["ranks"]
    monkeypatch.setitem(command.CONTROLS, "harmless", CONTROLS["rank_local"]._replace(make=VALID["uniform"]))
    assert command.main(["controls", "--quick"], {}) == AuditError.exit_code
    assert "harmless                 MISSED by ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, says",
    [
        (["slidng"], "slidng is no scorer; did you mean sliding?"),
        (["no.such.module:X"], "cannot be loaded: ModuleNotFoundError"),
        (["pgolf.audit.valid:Nothing"], "cannot be loaded: AttributeError"),
        (["pgolf.errors:PgolfError"], "is no scorer: it lacks"),
        (["uniform", "--model", "x"], "--model goes with"),
        (["plain", "--model", "no/such/file"], "No such file"),
        (["uniform", "--noise-tokens", "1"], "at least 2"),
        (["uniform", "--text", "no/such/shard.bin"], "no/such/shard.bin"),
    ],
)
def test_bad_input(argv, says, capsys):
    assert __main__.main(["audit", *argv], {}) in (2, 4)
    assert says in capsys.readouterr().err


def test_real_text(tmp_path, capsys):
    shard = tmp_path / "fineweb_val_000000.bin"
    write_shard(shard, (torch.arange(400) % 70).numpy())
    quick = ["--quick", "--no-controls", "--text", str(shard)]
    sizes = command._sizes(command._parser().parse_args(["uniform", "--noise-tokens", "300", *quick]))
    assert sizes.text.tolist() == (torch.arange(300) % 70).tolist()
    assert suite.run_tests(VALID["uniform"](70), sizes, ("noise", "prefix"))["noise"].status == "passed"
    assert __main__.main(["audit", "uniform", *quick], {}) == 2
    assert "400 tokens, the tests need 2,048" in capsys.readouterr().err
    assert __main__.main(["audit", "uniform", "--noise-tokens", "300", *quick], {}) == 2
    assert "token 69, uniform has 64 ids" in capsys.readouterr().err
