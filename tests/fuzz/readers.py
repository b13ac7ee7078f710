"""The readers of pgolf, one row each: what is good, how it is read, and what an accepted input must satisfy."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import math
import os
import struct
from pathlib import Path

import numpy as np
import torch
from harness import Reader, spill
from mutate import Files

from pgolf import checkpoint, config, result, resume, tree
from pgolf.artifact import codecs, pack, script
from pgolf.artifact.model_io import load_model, save_model
from pgolf.artifact.pack import HEAD
from pgolf.data import corpus, download, shards
from pgolf.data.batch import Batch
from pgolf.data.tokenizer import ByteTable, load_tokenizer, piece_bytes, prove_bytes
from pgolf.errors import ArtifactError, ConfigError, DataError
from pgolf.model.config import AttentionConfig, EmbedConfig, ModelConfig, PlanConfig, SmearConfig
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.presets import PRESETS
from pgolf.quant.config import QuantConfig
from pgolf.schema import RunConfig
from pgolf.submit import logs, record

VOCAB = 320
TEXT = ["def mark(x):\n    return x + 1\n", "class Ball:\n    x = 0\n    y = 12\n", "import os\n\tpass  # \u00e9\n"]

# -- shards ------------------------------------------------------------------------------------------------------

SHARD = "fineweb_train_000000.bin"


def good_shards(folder: Path) -> list[Files]:
    folder.mkdir()
    ids = np.arange(600) * 7 % VOCAB
    out = []
    for tokens in (ids, ids[:3]):
        shards.write_shard(folder / SHARD, tokens)
        out.append({SHARD: (folder / SHARD).read_bytes()})
    return out


def read_shards(folder: Path, files: Files) -> list[list[int]]:
    """As a run does: every shard checked, first and last scanned, then read."""
    found = shards.check_split(spill(folder, files), "train", VOCAB)
    return [shards.read_shard(path).tolist() for path in found]


def check_shards(files: Files, ids: list[list[int]]) -> None:
    """Against a second reader, written with struct."""
    (data,) = files.values()
    magic, version, count = struct.unpack_from("<3i", data)
    assert (magic, version) == (20240520, 1) and len(data) == 1024 + 2 * count
    assert ids == [list(struct.unpack_from(f"<{count}H", data, 1024))] and max(ids[0]) < VOCAB


# -- the embedded corpus -----------------------------------------------------------------------------------------


def good_corpus(folder: Path) -> list[Files]:
    root = folder / "sources"
    root.mkdir(parents=True)
    for i in range(40):
        (root / f"m{i}.py").write_text("".join(TEXT) * 3 + f"# {i}\n")
    found = corpus.build_or_load(folder / "cache", VOCAB, root=root)
    return [{p.name: p.read_bytes() for p in found.data_dir.iterdir()}]


def read_corpus(folder: Path, files: Files) -> corpus.CorpusPaths:
    """None stands for "damaged, build it again"; the harness wants an error."""
    found = corpus._load(spill(folder, files))
    if found is None:
        raise DataError("damaged: a run builds it again")
    return found


def check_corpus(files: Files, found: corpus.CorpusPaths) -> None:
    """What is accepted is whole: each file has its hash, and the counts are those of the files."""
    manifest = found.manifest
    assert manifest == json.loads(files[corpus.MANIFEST]) and manifest["self"] == corpus._digest(manifest)
    for name in (*corpus.SHARDS.values(), corpus.TOKENIZER):
        assert manifest["sha256"][name] == hashlib.sha256(files[name]).hexdigest()
    for split, name in corpus.SHARDS.items():
        assert manifest["splits"][split]["tokens"] == (len(files[name]) - 1024) // 2
        assert type(manifest["splits"][split]["bytes"]) is int
    assert manifest["vocab_size"] == VOCAB and manifest["format"] == corpus.FORMAT_VERSION


# -- tokenizer ---------------------------------------------------------------------------------------------------


def good_tokenizer(folder: Path) -> list[Files]:
    folder.mkdir()
    return [{"tokenizer.model": corpus.train_tokenizer([corpus.Document("a", t * 4) for t in TEXT], VOCAB)}]


def read_tokenizer(folder: Path, files: Files):
    """As a run does: load, make the byte table, prove the bytes of a split."""
    sp = load_tokenizer(spill(folder, files) / "tokenizer.model", VOCAB)
    table = ByteTable.from_sentencepiece(sp, VOCAB)
    proven = prove_bytes(sp, table, np.arange(3 * VOCAB) % VOCAB)
    return sp, table, proven


def check_tokenizer(files: Files, read) -> None:
    sp, table, proven = read
    assert sp.vocab_size() == VOCAB == len(table.base) and proven > 0
    assert (table.base + table.lead).tolist() == [len(b) for b in piece_bytes(sp)] and table.base.min() >= 0


# -- artifacts ---------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    dim=16,
    embed=EmbedConfig(vocab_size=32, smear=SmearConfig()),
    plan=PlanConfig(num_layers=1),
    attn=AttentionConfig(num_heads=2, num_kv_heads=1),
)


def good_artifacts(folder: Path) -> list[Files]:
    net = GPT(MODEL, train_length=8, max_length=16).init_weights(1)
    infos = roles_of(net)
    made = [
        save_model(net, infos, QuantConfig(codec=c, level=1, keep_numel=100), "abc") for c in [*codecs.CODECS, "auto"]
    ]
    made.append(save_model(net, infos, QuantConfig(matrix="float", embed="fp16", codec="zlib"), "abc"))
    return [{"model.pgolf": data} for data in made]


def read_artifact(folder: Path, files: Files) -> GPT:
    return load_model(files["model.pgolf"])


def same_artifact(files: Files, net: GPT) -> None:
    """A checksum over every byte: only an undamaged artifact is accepted."""
    assert files in ARTIFACTS, "accepted, although a byte differs"


ARTIFACTS: list[Files] = []


def good_artifacts_kept(folder: Path) -> list[Files]:
    ARTIFACTS[:] = good_artifacts(folder)
    return ARTIFACTS


def opened(folder: Path) -> list[Files]:
    """Artifacts taken apart: {head.bin, table.json, streams.bin}, so that mutations reach behind checksum and codec."""
    out = []
    for (data,) in (f.values() for f in good_artifacts(folder)):
        _, _, codec, packed, raw = HEAD.unpack_from(data)[:5]
        at = HEAD.size + packed
        table = codecs.known(codec).decompress(data[HEAD.size : at], raw)
        out.append({"head.bin": data[: HEAD.size - 32], "table.json": table, "streams.bin": data[at:]})
    return out


def forge(files: Files) -> bytes:
    """The parts put together with sizes and checksum that fit: what somebody would send who wants to do harm."""
    head = files.get("head.bin", b"")[:6].ljust(6, b"\0")
    table = files.get("table.json", b"")
    codec = next((c for c in codecs.CODECS.values() if c.id == head[5]), codecs.CODECS["zlib"])
    packed = codec.compress(table, codec.levels[0])
    stated = int.from_bytes(files.get("head.bin", b"")[10:14], "little")
    raw = stated if stated >= 2**20 else len(table)  # a lie that a mutation put there stays
    start = head + struct.pack("<II", len(packed), raw)
    body = packed + files.get("streams.bin", b"")
    return start + hashlib.sha256(start + bytes(32) + body).digest() + body


def read_forged(folder: Path, files: Files) -> GPT:
    return load_model(forge(files))


def check_model(files: Files, net: GPT) -> None:
    """It runs, and repacks to what was read."""
    records, meta = pack.unpack(forge(files))
    assert tree.from_dict(ModelConfig, meta["model"]) == net.cfg
    assert {r.name: r.shape for r in records} == {n: tuple(p.shape) for n, p in net.named_parameters()}
    ids = torch.zeros((1, 2), dtype=torch.int64)
    assert net(Batch(ids, ids))[0].shape == (1, 2)


# -- settings ----------------------------------------------------------------------------------------------------


def good_settings(folder: Path) -> list[Files]:
    """settings.txt: NAME=value lines, a blank line, path=value lines."""
    systems = [
        ("PRESET=smoke\nITERATIONS=20\nNUM_LAYERS=4\nMATRIX_LR=0.03\nVE_ENABLED=1\nVE_LAYERS=2,3\nLATE_QAT=1",
         "train.seed=3\nmodel.embed.smear=none\noptim.clip=on\noptim.clip.norm=0.5"),
        ("PRESET=rat_rod_green\nXSA_LAST_N=11\nBIGRAM_VOCAB_SIZE=4096\nSWA_ENABLED=1\nEMA_ENABLED=1\nTRIGRAM=1",
         "average.swa.every=10\ndata.loader=coprime_a\nschedule.kind=cosine\nquant.codec=zlib"),
        ("PGOLF_PRESET=h1\nTIDAL_LR=0\nCOSINE_LR=1\nMILE_GAMMA=0.75\nHOME=/root\nRANK=0\nLANG=C",
         "model.mlp.mult=3.0\nmodel.attn.value_embed=on\nmodel.attn.value_embed.layers=0,1\neval.stride=64"),
    ]  # fmt: skip
    return [{"settings.txt": f"{env}\n\n{argv}".encode()} for env, argv in systems]


def parts_of(files: Files) -> tuple[list[str], dict[str, str]]:
    """(arguments, environment) as Python would hand them over: bytes that are no UTF-8 become lone surrogates."""
    text = os.fsdecode(files.get("settings.txt", b"").replace(b"\0", b""))
    env, _, argv = text.partition("\n\n")
    pairs = [line.split("=", 1) for line in env.split("\n") if "=" in line]
    return [line for line in argv.split("\n") if line], dict(pairs)


def read_settings(folder: Path, files: Files) -> config.Settings:
    argv, environ = parts_of(files)
    return config.load(argv, environ, has_gpu=lambda: False)


def check_settings(files: Files, settings: config.Settings) -> None:
    check_config(files, settings.config)
    json.dumps(config.describe(settings), allow_nan=False)
    assert settings.sources.keys() == tree.flatten(settings.config).keys()


def check_config(files: Files, cfg: RunConfig) -> None:
    """It survives JSON, has a digest, no number is infinite or NaN, nothing is wrong with it."""
    text = json.dumps(tree.to_dict(cfg), allow_nan=False)
    assert tree.from_dict(RunConfig, json.loads(text)) == cfg
    assert tree.problems(cfg) == [] and len(config.digest(cfg)) == 64
    assert all(math.isfinite(v) for v in tree.flatten(cfg).values() if type(v) is float)


def good_trees(folder: Path) -> list[Files]:
    return [{"config.json": json.dumps(tree.to_dict(build())).encode()} for build in PRESETS.values()]


def read_tree(folder: Path, files: Files) -> RunConfig:
    try:
        data = json.loads(files["config.json"])
    except (ValueError, RecursionError, KeyError) as err:
        raise ConfigError("no JSON: the reader of the file says so") from err
    cfg = tree.from_dict(RunConfig, data)
    if wrong := tree.problems(cfg):
        raise ConfigError("; ".join(wrong)[:2000])
    return cfg


# -- a run's own files -------------------------------------------------------------------------------------------


def good_events(folder: Path) -> list[Files]:
    events = [{"t": i, "kind": "step", "step": i, "train_loss": 7 - i / 9, "lr_scale": 1 - i / 9} for i in range(1, 9)]
    events += [{"t": 9, "kind": "val", "step": 8, "val_loss": 3.1, "val_bpb": 1.9}, {"t": 9, "kind": "final", "n": "x"}]
    return [{"events.jsonl": "\n".join(map(json.dumps, events)).encode()}]


def read_events(folder: Path, files: Files):
    return result._read_curves(spill(folder, files) / "events.jsonl")


def check_events(files: Files, curves) -> None:
    """What matplotlib is given is numbers."""
    for events, keys in zip(curves, (("train_loss", "lr_scale"), ("val_loss", "val_bpb")), strict=True):
        for key in keys:
            steps, values = result._curve(events, key)
            assert len(steps) == len(values) and all(type(x) in (int, float) for x in (*steps, *values))
            np.array([steps, values], dtype=np.float64)


LISTING = {
    "datasets": [
        {"name": "fineweb10B_sp1024", "tokenizer_name": "sp1024", "stats": {"files_train": 3, "files_val": 1}},
        {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
    ],
    "tokenizers": [{"name": "sp1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}, {"name": "bytes"}],
}


def good_listing(folder: Path) -> list[Files]:
    return [{"manifest.json": json.dumps(LISTING).encode()}]


def read_listing(folder: Path, files: Files) -> list[str]:
    return download.wanted(download.read_listing(spill(folder, files) / "manifest.json"), "sp1024", 2, "datasets")


def check_listing(files: Files, paths: list[str]) -> None:
    """Files below the prefix, nowhere else."""
    for path in paths:
        assert path.startswith("datasets/") and path.isprintable()
        assert not {"", ".."} & set(path.split("/"))
    assert len(paths) == len(set(paths)) and len(paths) < 10**5


# -- checkpoints -------------------------------------------------------------------------------------------------

FACTS = {"step": 7, "tokens": 3584, "elapsed_ms": 12.5, "config": tree.to_dict(PRESETS["smoke"]()),
         "rng": [{"torch": "00ff"}], "last_losses": [[6, 5.5], [7, 5.25]]}  # fmt: skip


def saved_tensors() -> dict[str, torch.Tensor]:
    return {"model.w": torch.arange(24.0).view(4, 6), "optim.w.step": torch.tensor(7), "model.b": torch.ones(3).half()}


def good_checkpoints(folder: Path) -> list[Files]:
    path = checkpoint.write(folder, saved_tensors(), FACTS).path
    return [{p.name: p.read_bytes() for p in path.iterdir()}]


def read_checkpoint(folder: Path, files: Files):
    return checkpoint.read(spill(folder, files))


def check_checkpoint(files: Files, read) -> None:
    """A checksum over every tensor and every fact: only the checkpoint that was written is accepted."""
    tensors, facts = read
    expected = saved_tensors()
    assert facts == FACTS and tensors.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) and t.dtype == expected[name].dtype for name, t in tensors.items())


def opened_checkpoints(folder: Path) -> list[Files]:
    """Facts and tensors alone: the manifest is made anew, with hashes that fit."""
    (files,) = good_checkpoints(folder)
    return [{"facts.json": json.dumps(FACTS).encode(), checkpoint.STATE: files[checkpoint.STATE]}]


def read_forged_checkpoint(folder: Path, files: Files):
    """As a resumed run does: read, then compare the settings."""
    state = files.get(checkpoint.STATE, b"")
    try:
        facts = json.loads(files.get("facts.json", b""))
    except (ValueError, RecursionError) as err:
        raise ArtifactError("no JSON: another row damages the manifest itself") from err
    body = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "facts": facts}
    body["files"] = {checkpoint.STATE: checkpoint._entry(state)}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    manifest = json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()
    tensors, facts = checkpoint.read(spill(folder, {checkpoint.STATE: state, checkpoint.MANIFEST: manifest}))
    resume.check_settings(folder, facts, config.Settings(PRESETS["smoke"]()))
    return tensors, facts


def check_forged_checkpoint(files: Files, read) -> None:
    tensors, facts = read
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(files[checkpoint.STATE])
    saved = tree.from_dict(RunConfig, facts["config"])  # its free settings are compared with nothing and used by nobody
    assert tree.diff(saved, PRESETS["smoke"]()).keys() <= set(resume.FREE)


# -- submissions -------------------------------------------------------------------------------------------------

SEED = {"val_bpb": 1.1, "val_loss": 1.86, "artifact_bytes": 15_900_000, "train_wallclock_ms": 599_000.5, "steps": 7000}


def good_submissions(folder: Path) -> list[Files]:
    """Ours; one with others' names; one with almost nothing."""
    must = {"author": "A", "github_id": "a", "name": "N", "date": "2026-03-27", "val_bpb": 1.1}
    ours = must | {
        "track": "10min_16mb", "val_loss": 1.86, "val_bpb_std": 0.0, "bytes_total": 15_900_000, "bytes_code": 95_000,
        "bytes_model": 15_805_000, "seeds": [1, 2], "seed_results": {"1": SEED, "2": SEED}, "cuda_version": None,
    }  # fmt: skip
    others = must | {"seeds": {"seed_42": 1.1, "1337": {"val_bpb": 1.2}}, "artifact_bytes": 15_900_000}
    listed = must | {"runs": [{"seed": 7, **SEED}, {"seed": "8", "val_bpb": 1.0}]}
    return [{"submission.json": json.dumps(value).encode()} for value in (ours, others, listed, must)]


def read_submission(folder: Path, files: Files) -> record.Record:
    return record.load(files["submission.json"])


def check_submission(files: Files, got: record.Record) -> None:
    """Whatever was accepted is of its type and in its range, and stands in the file."""
    raw = json.loads(files["submission.json"].decode("utf-8-sig"))
    assert got.raw == raw and not got.problems
    assert all(isinstance(getattr(got, n), str) and getattr(got, n).strip() for n in ("author", "github_id", "name"))
    assert 0 < got.val_bpb < math.inf and got.val_bpb == raw["val_bpb"]
    for count in (got.bytes_total, got.bytes_code, got.bytes_model):
        assert count is None or (type(count) is int and count > 0)
    assert len(set(got.seeds)) == len(got.seeds) and all(type(s) is int and s >= 0 for s in got.seeds)
    for seed, score in got.seed_results.items():
        assert type(seed) is int and (score.val_bpb is None or 0 < score.val_bpb < math.inf)


LOG = """\
run: runs/a  preset:smoke seed:7 config digest:00
step:1/2 train_loss:5.1 train_time:83ms step_avg:83.11ms
stopping_early: wallclock_cap train_time:160ms step:2/2
Serialized model int6+brotli: 37282 bytes
Code size: 95837 bytes
Total submission size int6+brotli: 133119 bytes
final_int6_sliding val_loss:4.9780 val_bpb:4.2279 stride:64 eval_time:67ms
final_int6_sliding_exact val_loss:4.97799720 val_bpb:4.22793186
evidence val_tokens:1471 val_documents:12 targets:1470
  = training            0.63 s
total_eval_time: 1.5s
calibration source: train
"""


def good_logs(folder: Path) -> list[Files]:
    return [{"train.log": LOG.encode()}, {"train.log": LOG.replace("\n", "\r\n").encode()}]


def read_log(folder: Path, files: Files) -> logs.Log:
    return logs.read("train_seed1.log", files["train.log"].decode("utf-8", "replace"))


def check_log(files: Files, got: logs.Log) -> None:
    """Never an error, and numbers are numbers, zero or more."""
    for value in (got.val_bpb, got.val_loss, got.train_seconds, got.eval_seconds):
        assert value is None or value >= 0
    for value in (got.model_bytes, got.code_bytes, got.total_bytes, got.seed):
        assert value is None or (type(value) is int and value >= 0)
    assert got.number("targets") is None or got.number("targets") >= 0


def good_scripts(folder: Path) -> list[Files]:
    """A bundle, a common wrapper, and a plain script."""
    sources = {"pgolf/a.py": "x = 1\n" * 50, "train_gpt.py": "print('hello', 'world')\n" * 30}
    text = "\n".join(f"y{i} = {i * i}" for i in range(200)).encode()
    wrapper = b"exec(open_it(" + repr(base64.b85encode(lzma.compress(text))).encode() + b"))\n"
    return [{"train_gpt.py": data} for data in (script.compose(sources, "train_gpt.py"), wrapper, text)]


def read_script(folder: Path, files: Files) -> script.Script:
    return script.read(files["train_gpt.py"])


def check_script(files: Files, got: script.Script) -> None:
    """Nothing leads outside of a folder, and all of it is text."""
    assert got.data == files["train_gpt.py"] and got.files
    for name, text in got.files.items():
        assert isinstance(text, str) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name


READERS = [
    Reader(
        "submission.json", good_submissions, read_submission, check_submission, (ArtifactError,), accepts=(0.1, 0.9)
    ),
    Reader("train.log", good_logs, read_log, check_log, (), accepts=(1.0, 1.0)),
    Reader("script", good_scripts, read_script, check_script, (ArtifactError,), accepts=(0.05, 0.9)),
    Reader("checkpoint", good_checkpoints, read_checkpoint, check_checkpoint, (ArtifactError,)),
    Reader(
        "forged checkpoint",
        opened_checkpoints,
        read_forged_checkpoint,
        check_forged_checkpoint,
        (ArtifactError, ConfigError),
        accepts=(0.02, 0.9),
    ),
    Reader("shard", good_shards, read_shards, check_shards, (DataError,), accepts=(0.01, 0.9)),
    Reader("corpus", good_corpus, read_corpus, check_corpus, (DataError,)),
    Reader("tokenizer", good_tokenizer, read_tokenizer, check_tokenizer, (DataError,), accepts=(0.01, 0.9)),
    Reader("artifact", good_artifacts_kept, read_artifact, same_artifact, (ArtifactError,)),
    Reader("forged artifact", opened, read_forged, check_model, (ArtifactError,), accepts=(0.01, 0.9)),
    Reader("settings", good_settings, read_settings, check_settings, (ConfigError,), accepts=(0.1, 0.9)),
    Reader("config.json", good_trees, read_tree, check_config, (ConfigError,), accepts=(0.1, 0.9)),
    Reader("events.jsonl", good_events, read_events, check_events, (), accepts=(1.0, 1.0)),
    Reader("hub listing", good_listing, read_listing, check_listing, (DataError,), accepts=(0.1, 0.9)),
]
