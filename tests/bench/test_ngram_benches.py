"""The n-gram benches at toy sizes: what they say of noise, and that their pages hold their numbers."""

import torch

from bench import hashed_noise, ngram_counts


def test_noise(monkeypatch):
    """At 1/4096 of the size hashed scorers claim far less than 10 bits, the less the fewer buckets; exact ones not."""
    record, few = "hashed, n = 2 to 9, 8,388,608 buckets", "hashed, n = 2 to 9, 1,048,576 buckets"
    some = {name: scorer for name, scorer in hashed_noise.unsafe(4096).items() if name in (record, few)}
    monkeypatch.setattr(hashed_noise, "unsafe", lambda scale: some)
    monkeypatch.setattr(hashed_noise, "EXACT", ("pitman_yor", "calibrated_tilt"))
    found = hashed_noise.measure(4096)
    bits = {r["scorer"]: r["bits"] for r in found["rows"]}
    mass = {r["scorer"]: r["z"] for r in found["rows"]}
    assert bits[few] < bits[record] < 5 and mass[record] > 500
    exact = [r for r in found["rows"] if r["valid"]]
    assert len(exact) == 3 and all(r["bits"] > 10 - 64 / found["targets"] for r in exact)
    assert f"{bits[record]:.3f}" in hashed_noise.page(found)


def test_counts():
    found = ngram_counts.measure(600, 64, torch.device("cpu"))
    page = ngram_counts.page(found)
    assert len(found["scorers"]) == len(ngram_counts.SCORER_NAMES)
    assert all(r["nats_s"][0] > 0 for r in found["scorers"]) and "| one token |" in page
