"""Compiles every kernel ahead of time, with no GPU, and holds it to what the hardware allows and to committed figures.

    python -m bench.static [--arch 90,100] [--op mlp] [--json FILE] [--update]

The launches are those that the ops make at their production shapes (`bench/cases`), recorded on meta tensors, so what
is compiled is what runs: arguments, specialisation, block sizes. Exits with 1 when a kernel spills, needs more shared
memory than the arch has, is a product on sm_90 without wgmma, has an atomic that its case does not declare, or is
worse than `bench/static.json`. `--update` writes that file; commit it with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

COMMITTED = Path(__file__).with_name("static.json")
ARCHS = (80, 89, 90, 100, 120)
SMEM_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block, CUDA's tables
# what must not grow; the others are for reading
GUARDED = ("registers", "shared", "spills", "atomics")


@dataclass(frozen=True)
class Figures:
    """What ptxas and the disassembler say of one kernel."""

    kernel: str  # kernel[case]
    arch: int
    launch: str  # warps, stages, blocks
    registers: int  # a thread
    spills: int  # LDL + STL instructions: local memory is where spilled registers go
    shared: int  # bytes a block
    wgmma: int
    mma: int
    tcgen05: int
    tma: int  # bulk tensor copies, loads and stores
    wide: int  # 128-bit global loads and stores
    global_access: int  # all global loads and stores
    atomics: int
    is_product: bool  # has tl.dot

    def faults(self, allowed_atomics: bool) -> list[str]:
        """What the hardware or the house rules forbid."""
        out = []
        if self.spills:
            out.append(f"{self.spills} spill instructions, expected 0")
        if self.shared > SMEM_LIMIT[self.arch]:
            out.append(f"{self.shared} bytes of shared memory, expected at most {SMEM_LIMIT[self.arch]}")
        if self.arch == 90 and self.is_product and not self.wgmma:
            out.append("a product without wgmma")
        if self.atomics and not allowed_atomics:
            out.append(f"{self.atomics} atomics, expected 0")
        return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities, e.g. 90,100")
    parser.add_argument("--op", default="", help="only cases whose id contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name}")
    args = parser.parse_args(argv)
    archs = [int(a) for a in args.arch.split(",")]
    if unknown := set(archs) - set(ARCHS):
        parser.error(f"--arch {sorted(unknown)}: known are {', '.join(map(str, ARCHS))}")
    began = time.monotonic()
    rows = compile_all(archs, args.op)
    if not rows:
        parser.error(f"--op {args.op!r}: no case of that name has a production size")
    print_table(rows)
    faults = [f"sm_{r.arch} {r.kernel}: {fault}" for r in rows for fault in problems(r)]
    print(f"{len(rows)} kernels in {time.monotonic() - began:.0f} s, {len(faults)} faults")
    for fault in faults:
        print("FAULT", fault)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if args.update:
        write_committed(rows)
        return int(any(hardware_faults(r) for r in rows))  # a spill is a fault however it is committed
    return int(bool(faults))


def hardware_faults(row: Figures) -> list[str]:
    """What no committed figure excuses."""
    from .cases import CASES

    return row.faults(next(c for c in CASES if row.kernel.endswith(f"[{c.id}]")).atomics)


def problems(row: Figures) -> list[str]:
    """Faults of one kernel, and what is worse than the committed figures."""
    out, before = hardware_faults(row), committed().get(f"sm_{row.arch} {row.kernel}")
    if before is None:
        return [*out, f"not in {COMMITTED.name}: run with --update and commit it"]
    now = asdict(row)
    return out + [f"{what} {now[what]}, committed {before[what]}" for what in GUARDED if now[what] > before[what]]


def committed() -> dict[str, dict[str, int]]:
    """The committed figures; empty when they are another triton's, whose register counts do not compare."""
    import triton

    if not COMMITTED.exists():
        return {}
    saved = json.loads(COMMITTED.read_text())
    if saved["triton"] != triton.__version__:
        print(f"NOTE: {COMMITTED.name} is triton {saved['triton']}'s, this is {triton.__version__}: not compared")
        return _Anything()
    return saved["kernels"]


class _Anything(dict):
    """Figures that nothing is worse than."""

    def get(self, key, default=None):
        return dict.fromkeys(GUARDED, 10**9)


def write_committed(rows: list[Figures]) -> None:
    """Merges rows into the committed figures."""
    import triton

    saved = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    kernels = saved["kernels"] if saved.get("triton") == triton.__version__ else {}
    kernels |= {f"sm_{r.arch} {r.kernel}": {k: v for k, v in asdict(r).items() if k in GUARDED} for r in rows}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kernels.items())]
    COMMITTED.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n")


# -- compiling -------------------------------------------------------------------------------------------------------


def compile_all(archs: list[int], only: str = "") -> list[Figures]:
    """Every recorded launch on every arch, in as many processes as there are cores."""
    from .cases import CASES
    from .cases.case import PRODUCTION

    jobs = [(c.id, arch) for c in CASES if PRODUCTION in c.sizes and only in c.id for arch in archs]
    # spawned: the interpreter's switch is read when triton is imported, and must be off here
    with _no_interpreter(), ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_case, jobs) for row in found]
    return sorted(rows, key=lambda r: (r.kernel, r.arch))


@contextmanager
def _no_interpreter():
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def compile_case(job: tuple[str, int]) -> list[Figures]:
    """The figures of each distinct launch of a case on an arch."""
    from pgolf.kernels._op import recording

    from .cases import CASES
    from .cases.case import PRODUCTION
    from .check import evaluate

    name, arch = job
    case = next(c for c in CASES if c.id == name)
    with recording(arch) as seen:
        evaluate(case, case.fn, case.make(PRODUCTION, "meta", case.dtypes[-1]))
    distinct = {launch_key(one): one for one in seen.launches}
    return [figures(one, arch, name) for one in distinct.values()]


def launch_key(one) -> str:
    """What two launches share when one compilation serves both."""
    import torch

    brief = lambda a: str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ if a is not None else "-"
    args = ",".join(brief(a) for a in one.args)
    return f"{one.kernel.__name__}({args}){sorted(one.constants.items())}{one.how}"


def figures(one, arch: int, case_id: str) -> Figures:
    """Compiles one recorded launch for sm_<arch> through triton's own JIT, and reads the machine code."""
    import triton

    triton.runtime.driver.set_active(Pretend(arch))
    how = one.how
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
    with quiet():
        built = one.kernel.warmup(*one.args, grid=one.grid, **how.blocks, **one.constants, **options)
    usage, sass = disassemble(built.asm["cubin"])
    ptx = built.asm["ptx"]
    count = lambda pattern, text: len(re.findall(pattern, text))
    blocks = " ".join(f"{k}={v}" for k, v in how.blocks.items())
    return Figures(
        kernel=f"{one.kernel.__name__.strip('_').removesuffix('_kernel')}[{case_id}]",
        arch=arch,
        launch=f"w{how.num_warps} s{how.num_stages} {blocks}",
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        # "STL [R1], RZ" is no spill: on sm_120 ptxas guards each TMA copy with a call that takes a zero on the stack
        spills=count(r"\b(?:LDL|STL)\b(?!.*\[R1\], RZ\b)", sass),
        shared=built.metadata.shared,
        wgmma=count(r"wgmma\.mma_async", ptx),
        mma=count(r"\bmma\.sync", ptx),
        tcgen05=count(r"tcgen05\.mma", ptx),
        tma=count(r"cp\.async\.bulk\.tensor", ptx),
        wide=count(r"\b(?:LDG|STG)\.[.\w]*128\b", sass),
        global_access=count(r"\b(?:LDG|STG)\b", sass),
        atomics=count(r"\b(?:REDG?|ATOMG?)\b", sass),
        is_product="tt.dot" in built.asm["ttir"],
    )


class Pretend:
    """A driver that answers as a GPU of `arch` would, to triton's JIT up to the launch."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the JIT caches by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def quiet():
    """Triton writes a failing module, thousands of lines, to file descriptor 2."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) from the tools in triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *a: subprocess.run([str(tools / a[0]), *a[1:], file.name], capture_output=True, text=True).stdout
        return run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")


def print_table(rows: list[Figures]) -> None:
    """One line a kernel and arch."""
    head = f"{'kernel[case]':58s} arch regs spill   smem wgmma mma tc5 tma wide/all atom  launch"
    print(head)
    for r in rows:
        print(
            f"{r.kernel:58s} {r.arch:4d} {r.registers:4d} {r.spills:5d} {r.shared:6d} {r.wgmma:5d} {r.mma:3d}"
            f" {r.tcgen05:3d} {r.tma:3d} {r.wide:4d}/{r.global_access:<3d} {r.atomics:4d}  {r.launch}"
        )


if __name__ == "__main__":
    sys.exit(main())
