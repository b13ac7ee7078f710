"""Bytes that the compiled step moves in GPU memory, kernel by kernel, counted with no GPU.

    python -m bench.step_bytes --preset rat_rod_green [--path reference|kernels|both] [--fold]
                               [--attention triton|library] [--top 20] [--json FILE] [--check] [--update]

The real model and objective, forward and backward, go through torch.compile for a pretended H100 (bench/_pretend.py).
What Inductor generates counts each buffer that a kernel reads or writes once; an op of `kernels/` counts what its own
launches and products move (bench/trace.py). Weight casts and the optimiser are outside the compiled graph and are not
counted. "Glue" is all but matrix products and the attention core: what fusion can save. `--attention library` counts
FlashAttention-3 or cuDNN in the core's place: one kernel each way, between XSA kernels of ours.

`--check` fails when glue has grown by more than 2 % over `bench/step_bytes.json`; `--update` writes that file.
Exit codes: 0, 1 glue has grown, 2 bad arguments, 3 no GPU can be pretended here (needs g++ and a CPU-only torch).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.config import RunConfig
from pgolf.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

COMMITTED = Path(__file__).with_name("step_bytes.json")
SLACK = 1.02
PATHS = ("reference", "kernels")
GEMM, CORE, REST = "GEMM", "attention core", "rest"
GLUE = ("residual, norm", "qk prep", "MLP activation", "XSA", "cross-entropy", "embeddings", REST)
CLASSES = (GEMM, CORE, *GLUE)
ROWS = [*((kind, (kind,)) for kind in CLASSES), ("glue", GLUE), ("all", CLASSES)]
# an op of kernels/, or a file whose line an operation comes from
OF_OP = {
    "residual": "residual, norm",
    "qk_prep": "qk prep",
    "mlp": "MLP activation",
    "attention": "XSA",
    "cross_entropy": "cross-entropy",
    "bigram": "embeddings",
}
OF_FILE = {f"kernels/{op}.py": kind for op, kind in OF_OP.items()} | {
    "pgolf/model/wiring.py": "residual, norm",
    "pgolf/model/stream.py": "residual, norm",
    "pgolf/model/mlp.py": "MLP activation",
    "pgolf/model/objective.py": "cross-entropy",
    "pgolf/model/embed.py": "embeddings",
    "pgolf/model/features/value_embed.py": "embeddings",
    "pgolf/model/features/value_residual.py": "embeddings",
    "pgolf/model/linear.py": REST,
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# The public rat_rod_green script at the same shapes, counted in the same way: torch 2.13, FlashAttention-3 opaque
PUBLIC_GB = {
    GEMM: 51.5,
    CORE: 10.0,
    "residual, norm": 52.0,
    "qk prep": 23.4,
    "MLP activation": 16.6,
    "XSA": 13.8,
    "cross-entropy": 0.8,
    "embeddings": 0.0,
    REST: 0.4,
}


@dataclass(frozen=True)
class Moved:
    """One kernel of the step."""

    phase: str  # forward, backward
    kind: str  # one of CLASSES
    name: str
    bytes: int


@dataclass(frozen=True)
class Step:
    """All kernels of a compiled step."""

    preset: str
    path: str
    kernels: list[Moved]

    def bytes(self, kinds: Iterable[str] = CLASSES, phase: str = "") -> int:
        """Sum over classes, in one phase or in both."""
        return sum(k.bytes for k in self.kernels if k.kind in kinds and phase in ("", k.phase))

    def count(self, kinds: Iterable[str] = CLASSES) -> int:
        return sum(k.kind in kinds for k in self.kernels)

    def figures(self) -> dict[str, float]:
        """What is committed: GB by class, and what they sum to."""
        gb = {kind: round(self.bytes([kind]) / 1e9, 3) for kind in CLASSES}
        return gb | {"glue": round(self.bytes(GLUE) / 1e9, 3), "kernels": self.count()}


# -- the step --------------------------------------------------------------------------------------------------------


def compiled_step(cfg: RunConfig, path: str, world_size: int = 8, library: bool = False) -> Step:
    """The step of one GPU of `world_size`, with a library's attention core if asked. Needs `_pretend.install()`."""
    import torch

    from pgolf.data.batch import Batch
    from pgolf.kernels._op import paths
    from pgolf.model.gpt import GPT
    from pgolf.model.objective import Objective
    from pgolf.model.roles import roles_of
    from pgolf.quant.weight_cast import WeightCast

    from . import _pretend
    from .trace import share_rows

    fused, dtype = path == "kernels", torch.bfloat16
    chosen = dict.fromkeys(cfg.kernels.ops(), "triton" if fused else "reference")
    with paths(**chosen), _pretend.fake_mode():
        with torch.device("cuda"):
            fold = fused and cfg.kernels.fold_scales
            model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=dtype, fold_scales=fold)
            shape = (share_rows(cfg, world_size), cfg.data.seq_len)
            batch = Batch(torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64))
        if fused:
            WeightCast(model, roles_of(model), cfg.quant, dtype)  # from here on the graph's inputs are the casts
        graphs = _pretend.lower(Objective(cfg.loss, model, "cuda").__call__, batch)
    return Step(cfg.preset, path, [k for graph in graphs for k in graph_kernels(graph, library)])


def graph_kernels(graph, library: bool = False) -> list[Moved]:
    """Kernels of a lowered graph, ours opened up."""
    phase = "backward" if graph.backward else "forward"
    ours = [n for n in graph.calls if getattr(n.target, "namespace", "") == "pgolf"]
    out = []
    for k in graph.kernels:
        if getattr(k.op, "namespace", "") == "pgolf":
            continue
        name = str(k.op).removeprefix("aten.").removesuffix(".default") if k.op else f"fused: {words(k.nodes)}"
        out.append(Moved(phase, kind_of(k.op, k.nodes), name, k.moved))
    if (kept := len(graph.kernels) - len(out)) != len(ours):
        raise AssertionError(f"{phase}: the graph calls {len(ours)} ops of kernels/, its schedule has {kept}")
    return out + [moved for node in ours for moved in op_kernels(node, phase, library)]


def kind_of(op, nodes: Iterable) -> str:
    """The class of a kernel: of most of the operations that it computes."""
    name = str(op or "").split(".")
    if set(PRODUCTS) & set(name):
        return GEMM
    if any("scaled_dot_product" in part for part in name):
        return CORE
    votes = [kind for kind in map(kind_of_node, nodes) if kind]
    return max(CLASSES, key=votes.count) if votes else REST


def kind_of_node(node) -> str | None:
    """By the innermost known file in the stack of the line that the operation is, or is the gradient, of."""
    for path in reversed(re.findall(r'File "[^"]*?((?:kernels|pgolf)/[^"]*)"', node.stack_trace or "")):
        if path in OF_FILE:
            return OF_FILE[path]
    return None


def words(nodes: Iterable) -> str:
    """What a generated kernel computes, in a few words."""
    names = {}
    for node in nodes:
        name = str(getattr(node.target, "overloadpacket", node.target)).split(".")[-1]
        if "Gradient addition" in (node.stack_trace or ""):
            name = "gradient add"
        if name not in ("reshape", "view", "permute", "expand", "unsqueeze", "squeeze", "convert_element_type"):
            names[name] = names.get(name, 0) + 1
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in list(names.items())[:4]) or "cast, copy"


def op_kernels(node, phase: str, library: bool = False) -> list[Moved]:
    """What one call of an op of kernels/ launches on an H100: its body, run on meta tensors of the call's shapes."""
    from pgolf.kernels._op import recording

    from .trace import Trace, short

    trace, op, args = Trace(), node.target._opname, meta_arguments(node)
    given = dict(zip((a.name for a in node.target._schema.arguments), args, strict=True))
    if library and op in ("attention", "attention_bwd"):
        args[list(given).index("asked")] = "fa3"
    with opaque_core(trace), recording(90, watch=trace.watch) as trace.recording:
        node.target(*args)
    unread = {short(one): UNREAD[short(one)](one) for one in trace.recording.launches if short(one) in UNREAD}
    xsa = op != "attention_bwd" or given["s"] is not None
    return [
        Moved(phase, kind_of_event(e, xsa), f"{op}: {e.name}", e.bytes - unread.get(e.name, 0))
        for e in trace.events
        if e.bytes
    ]


def _values_in_qkv(one) -> int:
    """Bytes of the values in the packed qkv, which the backward of qk_prep steps over."""
    qkv, heads, kv = one.args[3], one.constants["H"], one.constants["K"]
    return qkv.numel() * qkv.element_size() * kv // (heads + 2 * kv)


def _values_without_xsa(one) -> int:
    """Bytes of the values, which the preparation of the attention backward reads with XSA only."""
    _, _, v, s = one.args[:4]
    return v.numel() * v.element_size() if s is None else 0


# launches that are given more than they read
UNREAD = {"qk_prep_bwd": _values_in_qkv, "exclude_bwd": _values_without_xsa}


@contextmanager
def opaque_core(trace) -> Iterator[None]:
    """FlashAttention-3 as a kernel that reads its arguments and writes its results, once each."""
    from pgolf.kernels._attention_peers import CORES, Core

    from .trace import Event, total_bytes

    def moves(*tensors):
        trace.events.append(Event(trace.phase, "attention", "library core", 1, total_bytes(list(tensors)), ""))

    def forward(q, k, v, cu_seqlens):
        o, lse = q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        moves(q, k, v, o, lse)
        return o, lse

    def backward(do, q, k, v, out, lse, cu_seqlens):
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        moves(do, q, k, v, out, lse, *grads)
        return grads

    import torch

    before = CORES["fa3"]
    CORES["fa3"] = Core(forward, backward, lambda need: "")
    try:
        yield
    finally:
        CORES["fa3"] = before


def kind_of_event(event, xsa: bool) -> str:
    """The class of what an op's body does: a launch with a product is one, whatever its epilogue adds."""
    op = event.op.removesuffix("_bwd")
    if op == "attention":
        return "XSA" if xsa and not event.is_product else CORE
    return GEMM if event.is_product else OF_OP[op]


def meta_arguments(node) -> list:
    """The arguments of a call, tensors on the meta device with the strides that they have in the graph. A tensor that
    is given twice stays one."""
    import torch
    from torch.utils import _pytree as pytree

    made: dict[int, Tensor] = {}

    def bare(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        return made[id(t)]

    values = torch.fx.node.map_arg(node.args, lambda n: n.meta["val"])
    return list(pytree.tree_map_only(torch.Tensor, bare, values))


# -- committed figures -----------------------------------------------------------------------------------------------


def key_of(cfg: RunConfig, path: str, library: bool = False) -> str:
    """The name of a count. What only kernels have does not change the reference."""
    variant = (" fold" if cfg.kernels.fold_scales else "") + (" library" if library else "")
    return f"{cfg.preset} {path}{variant if path == 'kernels' else ''}"


def committed() -> dict[str, dict[str, float]]:
    """The committed figures; empty, with a note, when they are another torch's: fusion is its decision."""
    import torch

    saved = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"torch": version(torch), "figures": {}}
    if saved["torch"] != version(torch):
        print(f"NOTE: {COMMITTED.name} is torch {saved['torch']}'s, this is {version(torch)}: not compared")
        return {}
    return saved["figures"]


def version(torch) -> str:
    return torch.__version__.split("+")[0]


def problem(key: str, now: dict[str, float], saved: dict[str, dict[str, float]]) -> str:
    """What --check has against these figures; empty if nothing."""
    if not saved:
        return ""
    if key not in saved:
        return f"{key}: not in {COMMITTED.name}: run with --update and commit it"
    before = saved[key]
    if now["glue"] <= SLACK * before["glue"]:
        return ""
    grown = {k: round(now[k] - before.get(k, 0), 2) for k in GLUE if now[k] > before.get(k, 0) + 0.005}
    return f"{key}: glue {now['glue']:.2f} GB, committed {before['glue']:.2f}; grown by {grown}"


def write_committed(figures: dict[str, dict[str, float]]) -> None:
    """Merges figures into the file; those of another torch are dropped."""
    import torch

    merged = committed() | figures
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(merged.items())]
    COMMITTED.write_text(f'{{"torch": "{version(torch)}", "figures": {{\n' + ",\n".join(lines) + "\n}}\n")


# -- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step_bytes", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="rat_rod_green", choices=list(PRESETS))
    parser.add_argument("--path", default="kernels", choices=(*PATHS, "both"), help="plain torch, our kernels, or both")
    parser.add_argument("--fold", action="store_true", help="with kernels.fold_scales=true")
    parser.add_argument("--attention", default="triton", choices=("triton", "library"), help="core on the kernels path")
    parser.add_argument("--top", type=int, default=12, help="how many of the largest glue kernels to list")
    parser.add_argument("--json", type=Path, help="write every kernel here")
    parser.add_argument("--check", action="store_true", help=f"fail if glue is over {COMMITTED.name} by 2 %%")
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name}")
    args = parser.parse_args(argv)
    if args.top < 0:
        parser.error(f"--top {args.top} must not be negative")
    if args.path == "reference" and (args.fold or args.attention == "library"):
        parser.error("--fold and --attention change the kernels path: got --path reference, expected kernels or both")
    from . import _pretend

    try:
        _pretend.install()
    except _pretend.CannotPretend as err:
        print(f"cannot pretend a GPU: {err}", file=sys.stderr)
        return 3
    return run(args)


def run(args: argparse.Namespace) -> int:
    cfg, library, steps = PRESETS[args.preset](), args.attention == "library", {}
    if args.fold:
        cfg = replace(cfg, kernels=replace(cfg.kernels, fold_scales=True))
    for path in PATHS if args.path == "both" else (args.path,):
        began = time.monotonic()
        steps[path] = compiled_step(cfg, path, library=library)
        print_step(steps[path], time.monotonic() - began, args.top)
    saved = committed()
    figures = {key_of(cfg, path, library): step.figures() for path, step in steps.items()}
    print_compared(args.preset, {path: (saved | figures).get(key_of(cfg, path, library)) for path in PATHS})
    if args.json:
        args.json.write_text(json.dumps({p: [asdict(k) for k in s.kernels] for p, s in steps.items()}, indent=1) + "\n")
    if args.update:
        write_committed(figures)
    problems = [p for key, now in figures.items() if args.check and (p := problem(key, now, saved))]
    for p in problems:
        print("FAULT", p)
    return int(bool(problems))


def print_step(step: Step, seconds: float, top: int) -> None:
    """The classes, then the largest kernels of the glue."""
    print(f"{step.preset}, {step.path}: {step.count()} kernels, counted in {seconds:.0f} s")
    print(f"{'class':16s}{'kernels':>8s}{'forward GB':>12s}{'backward GB':>12s}{'sum GB':>8s}")
    for name, kinds in ROWS:
        forward, backward = (step.bytes(kinds, phase) / 1e9 for phase in ("forward", "backward"))
        print(f"{name:16s}{step.count(kinds):8d}{forward:12.2f}{backward:12.2f}{forward + backward:8.2f}")
    for (phase, kind, name, size), n in largest(step)[:top]:
        print(f"  {n * size / 1e9:6.2f} GB = {n:3d} x {size / 1e6:7.1f} MB  {phase:9s}{kind:16s}{name}")


def largest(step: Step) -> list[tuple[tuple[str, str, str, int], int]]:
    """((phase, class, name, bytes), how many) of glue kernels, the largest sum first."""
    groups: dict[tuple[str, str, str, int], int] = {}
    for k in step.kernels:
        if k.kind in GLUE:
            key = (k.phase, k.kind, k.name, k.bytes)
            groups[key] = groups.get(key, 0) + 1
    return sorted(groups.items(), key=lambda item: -item[0][3] * item[1])


def print_compared(preset: str, figures: dict[str, dict[str, float] | None]) -> None:
    """GB by class: the public script where it is known, our reference, our kernels, and first less last."""
    columns = {"public": PUBLIC_GB} if preset == "rat_rod_green" else {}
    columns |= {path: found for path, found in figures.items() if found}
    if len(columns) < 2:
        return
    print(f"{'GB':16s}" + "".join(f"{name:>11s}" for name in columns) + f"{'saved':>11s}")
    for name, kinds in ROWS:
        row = [sum(c[k] for k in kinds) for c in columns.values()]
        print(f"{name:16s}" + "".join(f"{v:11.2f}" for v in (*row, row[0] - row[-1])))


if __name__ == "__main__":
    sys.exit(main())
