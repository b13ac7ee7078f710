"""The step ledger says what torch's own counter says, for every preset, and adds up."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed: no launches to trace")

from bench import ledger as L
from bench.gpus import GPUS, with_roofs
from bench.trace import SDPA, Trace, fused_sdpa, share_rows, trace_step
from pgolf.data.batch import Batch
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective
from pgolf.presets import PRESETS

H100 = GPUS["h100"]


def counted(preset: str) -> dict[str, int]:
    """torch's FlopCounterMode over forward and backward of the reference model on meta tensors, by op."""
    cfg = PRESETS[preset]()
    with torch.device("meta"):
        model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=torch.bfloat16)
        ids = torch.empty((share_rows(cfg), cfg.data.seq_len), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, fused_sdpa():
        Objective(cfg.loss, model, "meta")(Batch(ids, ids))[0].backward()
    return {op.__name__: n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_equal_torchs_counter(preset):
    """Products to the last FLOP; attention by the causal convention, half of what the counter counts. On both paths."""
    want = counted(preset)
    attention = sum(n for op, n in want.items() if op in SDPA) // 2
    products = sum(n for op, n in want.items() if op not in SDPA)
    for path in ("triton", "reference"):
        events = [e for e in trace_step(PRESETS[preset](), 90, path) if e.phase in ("forward", "backward")]
        core = sum(e.flops for e in events if e.name in L.CORE)
        assert core == attention > 0
        assert sum(e.flops for e in events) - core == products > 0


def test_reference_preset_is_23_55_tflop():
    """By hand: 6 FLOP a token for 25,952,256 + 524,288 matrix parameters, 3.5 x 2 S d a layer for attention, and the
    tables' projections (2048 x 128 x 512 and 1024 x 128 x 256), each forward and twice in backward."""
    found = L.ledger(PRESETS["rat_rod_green"](), H100)
    tokens = 98304
    by_hand = tokens * (6 * (25_952_256 + 524_288) + 11 * 3.5 * 2 * 2048 * 512)
    by_hand += 6 * (2048 * 128 * 512 + 1024 * 128 * 256)
    assert found.tokens == tokens
    assert found.model_flops == by_hand == pytest.approx(23.55e12, rel=1e-3)
    assert found.mfu(87.2) == pytest.approx(0.273, abs=1e-3)


def test_kernels_move_fewer_bytes_and_folding_fewer_still():
    cfg = PRESETS["rat_rod_green"]()
    folded = L.replace(cfg, kernels=L.replace(cfg.kernels, fold_scales=True))
    glue = [L.ledger(c, H100, path).glue_bytes for c, path in ((cfg, "reference"), (cfg, "triton"), (folded, "triton"))]
    assert glue[0] > 3 * glue[1] and glue[1] > 1.02 * glue[2]


def test_bytes_of_a_known_launch():
    """residual_fwd of the final norm: two streams and two weights... read, sum and norm written, one fp32 a row."""
    events = trace_step(PRESETS["rat_rod_green"](), 90)
    fwd = [e for e in events if e.name == "residual_fwd"]
    stream = 98304 * 512 * 2
    assert len(fwd) == 2 * 11 + 1 + 1  # mix and add of each layer, the kept output that no mix writes, the final norm
    small = 98304 * 4 + 4 * 512 * 4
    assert all(0 <= e.bytes % stream <= small for e in fwd)
    assert min(e.bytes // stream for e in fwd) == 3 and max(e.bytes // stream for e in fwd) == 6


def test_every_op_of_the_model_is_in_the_trace():
    events = trace_step(PRESETS["kitchen_sink_v2"](), 90)
    ops = {e.op for e in events}
    for op in ("attention", "bigram", "cross_entropy", "mlp", "qk_prep", "residual"):
        assert {op, f"{op}_bwd"} <= ops, op
    assert {"newton_schulz", "int6_cast"} <= {o.rstrip("_") for o in ops}


def test_adding_up_and_bounds():
    found = L.ledger(PRESETS["pr401"](), H100)
    assert found.total("ms") == pytest.approx(sum(r.ms for r in found.rows))
    assert {r.phase for r in found.rows} == set(L.PHASES)
    for r in found.rows:
        assert r.ms >= r.floor_ms - 1e-12 or r.phase in ("data", "communication")
        assert r.bound in ("tensor core", "memory", "latency", "link", "host")
    by_kernel = {r.kernel: r for r in found.rows}
    assert by_kernel["residual_fwd"].bound == "memory" and by_kernel["attention_fwd"].bound == "tensor core"


def test_one_gpu_has_no_communication_and_the_whole_batch():
    alone = L.ledger(PRESETS["rat_rod_green"](), H100, world_size=1)
    assert alone.tokens == 786_432 and alone.total("bytes", ("communication",)) == 0


def test_measured_roofs_replace_the_planning_rates(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"roofs": {"copy": 1e12, "gemm": 2e14, "other": 3}}))
    got = with_roofs(H100, path)
    assert (got.copy, got.gemm, got.attention) == (1e12, 2e14, H100.attention)


def test_expanded_tensors_count_what_they_store():
    trace = Trace()
    with trace:
        torch.empty(1, 64, device="meta").expand(1000, 64) + torch.empty(1000, 64, device="meta")
    (add,) = [e for e in trace.events if e.name == "add"]
    assert add.bytes == 4 * 64 * (1 + 1000 + 1000)


def test_command_line(tmp_path, capsys):
    assert L.main(["--preset", "h1", "--gpu", "h200", "--ms", "50", "--json", str(tmp_path / "l.json")]) == 0
    text = capsys.readouterr().out
    assert "MFU at 50 ms" in text and "mlp_up" in text and "glue" in text
    saved = json.loads((tmp_path / "l.json").read_text())
    assert (
        saved["totals"]["ms"] == pytest.approx(sum(r["ms"] for r in saved["rows"]))
        and saved["gpu"]["name"] == "H200 SXM"
    )


@pytest.mark.parametrize("args", [["--preset", "nope"], ["--gpu", "abacus"], ["--world-size", "0"], ["--ms", "-1"]])
def test_bad_arguments(args, capsys):
    with pytest.raises(SystemExit) as stop:
        L.main(args)
    assert stop.value.code == 2 and args[0] in capsys.readouterr().err
