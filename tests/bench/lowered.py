"""Run by test_step_bytes.py in a process of its own: what is counted for small graphs, as JSON on the last line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import _pretend, step_bytes

try:
    _pretend.install()
except _pretend.CannotPretend as err:
    print(f"cannot pretend a GPU: {err}", file=sys.stderr)
    sys.exit(3)

import torch
import torch.nn.functional as F

from bench.trace import trace_step
from pgolf import presets
from pgolf.kernels._op import paths
from pgolf.kernels.residual import residual
from pgolf.model.mlp import Mlp


def moved(fn, *shapes):
    """[(class, bytes) of each kernel] forward and backward, of fn on bf16 leaves."""
    with _pretend.fake_mode(), paths(residual="triton"), torch.device("cuda"):
        leaves = [torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        graphs = _pretend.lower(fn, *leaves)
    return [[(k.kind, k.bytes) for k in step_bytes.graph_kernels(g)] for g in graphs]


def two_layers(**model):
    """rat_rod_green with 2 layers, 8 rows of 256 tokens on each of 8 GPUs."""
    cfg = presets.rat_rod_green()
    plan = replace(cfg.model.plan, num_layers=2)
    data = replace(cfg.data, seq_len=256, batch_tokens=8 * 8 * 256)
    return replace(cfg, data=data, model=replace(cfg.model, plan=plan, **model))


cfg = two_layers()
kernels, reference = (step_bytes.compiled_step(cfg, path) for path in ("kernels", "reference"))
library = step_bytes.compiled_step(cfg, "kernels", library=True)
traced = [(e.phase, e.name, e.bytes) for e in trace_step(cfg, 90) if e.op and e.bytes and e.phase != "optimizer"]
plain = Mlp.forward
Mlp.forward = lambda self, x: plain(self, x).tanh()  # one more pass over the stream, and its gradient
grown = step_bytes.compiled_step(cfg, "kernels")

print(
    json.dumps(
        {
            "pointwise": moved(lambda x: F.gelu(x).sin(), (1024, 512)),
            "product": moved(lambda x, w: (x @ w).tanh(), (1024, 512), (512, 256)),
            "op": moved(lambda x, y: residual([x.tanh(), y], [None, None])[1], (1024, 512), (1024, 512)),
            "steps": {
                name: [(k.phase, k.kind, k.name, k.bytes) for k in step.kernels]
                for name, step in {
                    "kernels": kernels, "reference": reference, "library": library, "grown": grown
                }.items()
            },
            "figures": {"kernels": kernels.figures(), "grown": grown.figures()},
            "traced": traced,
        }
    )
)  # fmt: skip
