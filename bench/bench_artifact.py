"""Benchmarks of the artifact on a CPU: packing and reloading with each codec, decoding alone, the code's bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from pgolf import presets
from pgolf.artifact import codecs, script
from pgolf.artifact.bundle import bundle
from pgolf.artifact.model_io import load_model, save_model
from pgolf.artifact.pack import unpack
from pgolf.config import RunConfig
from pgolf.errors import SetupError
from pgolf.model.config import BigramConfig
from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo, roles_of
from pgolf.quant.config import QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import Record, dequantize

from .fixtures import build, one_thread  # noqa: F401
from .ratios import CPU_TIME, gate, rates


def system() -> RunConfig:
    """The cpu preset, narrower and with smaller hash tables: brotli packs 0.3 MB a second."""
    cfg = presets.cpu()
    embed = replace(cfg.model.embed, bigram=BigramConfig(rows=512, dim=64, trigram=True))
    return replace(cfg, model=replace(cfg.model, dim=192, embed=embed))


@cache
def trained() -> tuple[GPT, list[ParamInfo]]:
    model = build(system())
    return model, roles_of(model)


@cache
def records() -> list[Record]:
    """What the artifact must hold."""
    infos = trained()[1]
    return quantize_state({i.name: i.param.detach() for i in infos}, infos, system().quant)


def with_codec(name: str) -> QuantConfig:
    """The preset's quantisation with another codec; skips the test where its package is missing."""
    try:
        codecs.get(name)
    except SetupError as err:
        pytest.skip(str(err))
    return replace(system().quant, codec=name)


def assert_is_the_model(loaded: GPT) -> None:
    """Every parameter has exactly the value that its quantised record stands for."""
    expected, got = dequantize(records()), dict(loaded.named_parameters())
    assert got.keys() == expected.keys() and all(torch.equal(got[name], w) for name, w in expected.items())


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.benchmark(group="pack")
def test_pack(benchmark, codec):
    """Quantising and packing at the codec's strongest level; reloading must be the faster of the two."""
    quant = with_codec(codec)
    save = lambda: save_model(*trained(), quant, "")
    data = save()
    assert unpack(data)[0] == records()  # bit for bit
    gate(benchmark, ("reload", lambda: load_model(data)), ("pack", save), at_most=0.4, check=assert_is_the_model)
    assert benchmark.pedantic(save, rounds=1) == data
    rates(benchmark, parameters=sum(i.param.numel() for i in trained()[1]))
    benchmark.extra_info["artifact_bytes"] = len(data)


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.benchmark(group="reload")
def test_reload(benchmark, codec):
    """The model from the bytes of the file."""
    data = save_model(*trained(), replace(with_codec(codec), level=codecs.CODECS[codec].levels[1]), "")
    assert_is_the_model(load_model(data))
    assert_is_the_model(benchmark(load_model, data))
    rates(benchmark, parameters=sum(i.param.numel() for i in trained()[1]))


def decoder(codec: str, raw: bytes) -> Callable[[], bytes]:
    """Decodes `raw` from the codec's strongest level."""
    coder = codecs.get(codec)
    stream = coder.compress(raw)
    return lambda: coder.decompress(stream, len(raw))


# Largest share of lzma's time. brotli's is 0.5 on one AMD EPYC and 1.03 on another, of the same name but half the speed
DECODERS = {"brotli": 1.3, "zstd": 0.1, "zlib": 0.3}


@pytest.mark.parametrize("codec", DECODERS)
@pytest.mark.benchmark(group="decode")
def test_decode(benchmark, codec):
    """Decoding all int6 values of the model, against lzma."""
    with_codec(codec)
    raw = b"".join(r.parts["q"].tobytes() for r in records() if r.kind == "int6")
    decode, reference = decoder(codec, raw), decoder("lzma", raw)
    assert reference() == raw

    def check(got: bytes) -> None:
        assert got == raw

    gate(benchmark, (codec, decode), ("lzma", reference), at_most=DECODERS[codec], check=check, clock=CPU_TIME)
    benchmark(decode)
    rates(benchmark, bytes=len(raw))


@pytest.mark.benchmark(group="bundle")
def test_bundle(benchmark):
    """The code that ships, from its sources; unpacking it, which every rank does at its start, must be far faster."""
    made = script.make()
    unpack = lambda: script.read(made.data)
    assert unpack().files == made.files
    gate(benchmark, ("unpack", unpack), ("bundle", bundle), at_most=0.1)
    assert benchmark.pedantic(bundle, rounds=1) == made.data
    benchmark.extra_info["bundle_bytes"] = len(made.data)
