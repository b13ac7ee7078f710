"""The one account of bytes."""

import json

import numpy as np
import pytest

from pgolf.artifact.budget import LIMIT, account, check
from pgolf.artifact.pack import pack
from pgolf.errors import ArtifactError, BudgetError
from pgolf.quant.policy import Record


def artifact(n=3000):
    q = np.random.default_rng(0).integers(-128, 128, (n, 10), dtype=np.int8)  # incompressible
    scale = np.ones(n, np.float16)
    return pack([Record("w", "matrix", "int8", q.shape, {"q": q, "scale": scale})], {}, "zlib", 1)


def test_sizes_are_the_literal_lengths_and_add_up(tmp_path):
    data, code = artifact(), b"x" * 1234
    report = account(data, code)
    assert (report.artifact_bytes, report.code_bytes) == (len(data), 1234)
    assert report.total_bytes == len(data) + 1234 == sum(report.items.values())
    assert report.headroom == 16_000_000 - report.total_bytes
    path = tmp_path / "model.pgolf"
    path.write_bytes(data)
    assert account(path, code) == account(str(path), code) == report
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_at_the_limit_is_within_and_one_byte_more_is_over():
    data = artifact()
    check(account(data, bytes(LIMIT - len(data))))
    with pytest.raises(BudgetError, match="1 must go") as e:
        check(account(data, bytes(LIMIT - len(data) + 1)))
    assert e.value.exit_code == 5


def test_over_the_limit_names_the_three_largest():
    with pytest.raises(BudgetError) as e:
        check(account(artifact(), bytes(LIMIT)))
    largest = str(e.value).splitlines()[1]
    assert largest.index("code") < largest.index("matrix.int8.q") < largest.index("table")
    assert "matrix.int8.scale" not in largest


def test_lines_show_every_item_and_the_state():
    report = account(artifact(), b"x" * 1234)
    text = "\n".join(report.lines())
    assert all(name in text for name in report.items) and "1,234" in text and "B left" in text
    assert f"{len(artifact()):,}" not in text.split("total")[1]
    assert "OVER" in account(artifact(), bytes(LIMIT)).lines()[-1]


def test_no_artifact_or_a_foreign_one(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        account(tmp_path / "none", b"")
    with pytest.raises(ArtifactError, match="not a pgolf artifact"):
        account(b"something else entirely" * 9, b"")
