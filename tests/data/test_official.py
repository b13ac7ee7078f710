"""The official split in numbers: what passes, and what each known error is told to be."""

import dataclasses
import re

import pytest

from pgolf.data import official
from pgolf.data.official import DOCUMENTS, NORMALISED_BYTES, OFFICIAL, ORIGINAL_BYTES, Split
from pgolf.errors import DataError


def split(export, **changes):
    """The numbers of an export as it should be: 100 targets behind the last whole sequence."""
    whole = ORIGINAL_BYTES if export.case_operators else NORMALISED_BYTES
    good = Split(
        export.vocab_size, export.targets + 101, DOCUMENTS, 1, whole, lambda t: {export.targets: export.bytes}[t],
        case_operators=export.case_operators, sidecar=export.case_operators,
    )  # fmt: skip
    return dataclasses.replace(good, **changes)


SP1024, SP4096, _, SP8192, CASE = OFFICIAL


@pytest.mark.parametrize("export", OFFICIAL, ids=lambda e: e.name)
def test_exports_are_recognised(export):
    assert export.targets % official.SEQ_LEN == 0
    assert official.verify(split(export)).startswith(f"official: the {export.name} export")


def test_the_table_is_the_published_ratios():
    ratios = [2.435930, 3.319681, 3.319252, 3.726631, 3.157152]
    assert [e.bytes_per_token for e in OFFICIAL] == pytest.approx(ratios, abs=2e-4)
    assert [round(OFFICIAL[i].bytes_per_token, 6) for i in (0, 4)] == [2.435930, 3.157152]


@pytest.mark.parametrize("off", [-1, 1])
def test_one_byte_off_is_refused(off):
    with pytest.raises(DataError, match=rf"sp1024 has 151,080,363 \({re.escape(f'{off:+d}')} bytes"):
        official.verify(split(SP1024, bytes_of=lambda t: SP1024.bytes + off))
    official.verify(split(SP4096, bytes_of=lambda t: SP4096.bytes + off))  # known from printed scores only
    with pytest.raises(DataError, match=r"\+0\.02 %"):
        official.verify(split(SP4096, bytes_of=lambda t: round(SP4096.bytes * 1.0002)))


ERRORS = {
    "U+FFFD": ((SP1024, {"bytes_of": lambda t: 157_319_833}), r"\+4\.13 %.: the mark of undecodable .* U\+FFFD"),
    "doubled space": ((SP8192, {"bytes_of": lambda t: 176_332_748}), "leading space counted twice"),
    "no lone space": ((SP8192, {"bytes_of": lambda t: round(SP8192.bytes / 0.8)}), "no lone space piece"),
    "PR #1795": ((CASE, {"bytes_of": lambda t: 152_570_124}), r"\+0\.99 %.: the mark of the over-count"),
    "truncated file": ((CASE, {"tokens": 9_662_465, "documents": 10_100}), "a truncated val file .*#1923"),
    "parallel workers": ((CASE, {"tokens": 36_562_950, "documents": 41_597}), "parallel workers .*#2109"),
    "no BOS": ((CASE, {"documents": 0, "first_token": 7}), "0 documents .*BOS was left out"),
    "10,000 documents": ((SP8192, {"documents": 10_000}), "10,000 documents .* expected 50,000"),
    "first token": ((SP1024, {"first_token": 5}), "begins with token 5"),
    "own tokenizer": ((SP1024, {"vocab_size": 2000, "bytes": NORMALISED_BYTES + 20_000}), r"\+20,000 bytes, \+0\.01"),
    "own tokenizer, U+FFFD": ((SP1024, {"vocab_size": 2000, "bytes": 157_319_833}), "U.FFFD"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "told"), ERRORS.values(), ids=ERRORS)
def test_known_errors_are_named(case, told):
    with pytest.raises(DataError, match=told):
        official.verify(split(case[0], **case[1]))


def test_other_data_pass():
    """Own tokenizations of the split, parts of it, and data that only have its name or its number of documents."""
    own = split(SP1024, vocab_size=2000, tokens=50_000_001, bytes=NORMALISED_BYTES - 4000)
    assert official.verify(own).startswith("official: another tokenization")
    part = split(SP1024, tokens=1_000_001, documents=800, bytes=2_400_000)
    small = split(SP1024, tokens=1_000_001, bytes=3_000_000)
    foreign = split(SP1024, tokens=50_000_001, bytes=170_000_000, named=False)
    for data in (part, small, foreign):
        assert "not the challenge's" in official.verify(data)


def test_a_sidecar_of_the_original_beside_plain_tokens():
    """Its bytes are of the text before it was folded, which the table's are not."""
    assert "sp8192" in official.verify(
        split(SP8192, sidecar=True, bytes=ORIGINAL_BYTES, bytes_of=lambda t: SP8192.bytes - 246)
    )


def test_marks_of_the_leaking_export():
    assert "datasets/datasets" in official.leak_mark("/x/datasets/datasets/y", 80)
    assert "1,499 training shards" in official.leak_mark("/x/datasets/y", 1499)
    assert official.leak_mark("/x/datasets/y", 80) == official.leak_mark("", 103) == ""
