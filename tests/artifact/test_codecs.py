"""Every codec: round trip, levels, bombs, damage, and what happens when its package is missing."""

import builtins
import contextlib
import sys
import tracemalloc

import numpy as np
import pytest

from pgolf.artifact import codecs
from pgolf.errors import ArtifactError, ConfigError, SetupError
from pgolf.quant.config import CODEC_NAMES as SETTINGS

CODEC_NAMES = [name for name in SETTINGS if name != "auto"]
DATA = np.random.default_rng(0).normal(0, 6, 20_000).astype(np.int8).tobytes()


def test_the_settings_know_the_same_codecs_and_ids_are_unique():
    assert set(codecs.CODECS) == set(CODEC_NAMES)
    assert len({c.id for c in codecs.CODECS.values()}) == len(CODEC_NAMES)
    assert all(codecs.known(c.id) is c for c in codecs.CODECS.values())


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("data", [b"", b"x", DATA], ids=["empty", "one", "int8"])
def test_round_trip_at_the_ends_of_the_levels(name, data):
    codec = codecs.get(name)
    for level in (-1, codec.levels[0], codec.levels[-1]):
        assert codec.decompress(codec.compress(data, level), len(data)) == data
    assert codec.compress(data) == codec.compress(data, codec.levels[-1])


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_strongest_level_is_near_the_entropy(name):
    p = np.bincount(np.frombuffer(DATA, np.uint8), minlength=256) / len(DATA)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * len(DATA) / 8
    assert entropy < len(codecs.get(name).compress(DATA)) < 1.15 * entropy


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_bomb_is_refused_without_inflating_it(name):
    codec = codecs.get(name)
    bomb = codec.compress(bytes(2**28), codec.levels[0 if name == "lzma" else len(codec.levels) // 2])
    assert len(bomb) < 2**19
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="more than the 1000 bytes"):
        codec.decompress(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27  # of 256 MiB


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_damage_raises_artifact_error_or_shows_in_the_output(name):
    codec = codecs.get(name)
    stream = codec.compress(DATA, codec.levels[1])
    rng = np.random.default_rng(1)
    for _ in range(60):
        bad = bytearray(stream)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        for damaged in (bytes(bad), stream[: rng.integers(len(stream))]):
            with contextlib.suppress(ArtifactError):
                assert len(codec.decompress(damaged, len(DATA))) <= len(DATA)


@pytest.mark.parametrize(("name", "package"), [("brotli", "brotli"), ("zstd", "zstandard")])
def test_missing_package_is_named_with_its_pip_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    used = codecs.CODECS[name]
    for f in (lambda: codecs.get(name), lambda: codecs.choice("auto"), lambda: codecs.need([used, used])):
        with pytest.raises(SetupError, match=f"pip install {package}$"):
            f()
    codecs.need([codecs.CODECS["lzma"]])


def test_all_missing_packages_are_named_at_once(monkeypatch):
    for package in ("brotli", "zstandard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SetupError, match=r"needs brotli and zstandard.*pip install brotli zstandard$"):
        codecs.need(codecs.CODECS.values())


def test_auto_is_all_of_them():
    assert codecs.choice("auto") == list(codecs.CODECS.values()) and codecs.choice("lzma") == [codecs.CODECS["lzma"]]


def test_importing_needs_no_codec(monkeypatch):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name not in ("brotli", "zstandard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    monkeypatch.delitem(sys.modules, "pgolf.artifact.codecs")
    import pgolf.artifact.codecs  # noqa: F401


def test_unknown_codec_and_level():
    with pytest.raises(ConfigError, match="brotli, zstd, lzma, zlib"):
        codecs.get("lz4")
    with pytest.raises(ArtifactError, match="codec id 99"):
        codecs.known(99)
    with pytest.raises(ConfigError, match=r"level=12: brotli has .*0\.\.11"):
        codecs.get("brotli").compress(b"", 12)
