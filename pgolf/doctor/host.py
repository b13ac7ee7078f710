"""Checks of the host: cores, memory, folders that must be written (by writing), limits, torchrun's variables."""

from __future__ import annotations

import errno
import getpass
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pgolf import node
from pgolf.doctor.rows import FAIL, NONE, OK, WARN, Check, Machine, Row, size
from pgolf.errors import PgolfError

RUN_BYTES = 500_000_000  # a checkpoint of the largest preset and the files beside it
CACHE_BYTES = 64_000_000  # the embedded corpus, or the compiled code of a preset
MEMORY_LOW, MEMORY_NONE = 4 << 30, 1 << 30  # a process with a GPU needs about 3 GiB of the host
SHM_LOW = 1 << 30  # NCCL's buffers on one machine; Docker's default is 64 MB
FILES_LOW = 1024


# -- cores and memory ------------------------------------------------------------------------------------------------


def cores(machine: Machine) -> Iterator[Row]:
    """How many cores a run may use, and how many of them others keep busy."""
    mine, there = node.cores(proc=machine.proc), os.cpu_count() or 1
    text = f"{mine:g} of {there}, {node.cpu_model(machine.proc)}"
    ranks = machine.ranks_here
    busy = busy_cores(machine.proc)
    if busy is not None:
        text += f"; {busy:.1f} busy"
    if busy is not None and busy > 0.5 * mine + 0.25:
        yield Row(
            "cores", WARN, text, "see `top`; on a busy machine a run takes fewer steps, and its numbers mean less"
        )
    elif mine < 2 * ranks:
        yield Row("cores", WARN, f"{text}; fewer than 2 for each of {ranks} process(es)", "loading data may be slow")
    else:
        yield Row("cores", OK, text)


def busy_cores(proc: Path = Path("/proc"), seconds: float = 0.25) -> float | None:
    """Cores' worth of work in the next `seconds` on the cores that this process may use; None where it is not told."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    before = _ticks(proc)
    time.sleep(seconds)
    after = _ticks(proc)
    shares = [
        (after[k][0] - before[k][0]) / (after[k][1] - before[k][1])
        for k in before
        if k in after and after[k][1] > before[k][1]
    ]
    return sum(shares) if shares else None


def _ticks(proc: Path) -> dict[str, tuple[int, int]]:
    """core: (busy, all) ticks since the start."""
    mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
    out = {}
    for line in (proc / "stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in mine:
            numbers = [int(t) for t in ticks[:8]]  # user nice system idle iowait irq softirq steal
            out[name] = (sum(numbers) - numbers[3] - numbers[4], sum(numbers))
    return out


def memory(machine: Machine) -> Iterator[Row]:
    """Memory that is free, within a container's limit."""
    total, left = node.memory_bytes(proc=machine.proc), available(machine.proc)
    if not total or left is None:
        yield Row("memory", NONE, "the system does not tell")
        return
    left = min(left, total)
    text, need = f"{left / 2**30:.1f} of {total / 2**30:.1f} GiB available", machine.ranks_here
    if left < MEMORY_NONE:
        yield Row("memory", FAIL, text, "end other processes, or raise the container's limit")
    elif left < MEMORY_LOW * (need if machine.gpus else 1):
        yield Row("memory", WARN, f"{text}; about 4 GiB a process are needed", "fewer processes, or a larger machine")
    else:
        yield Row("memory", OK, text)


def available(proc: Path) -> int | None:
    """MemAvailable in bytes."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


# -- folders ---------------------------------------------------------------------------------------------------------


def folders(machine: Machine) -> Iterator[Row]:
    """Every folder that a run writes: by reserving space in it, writing and reading back, and mapping it executable.

    Free space as `df` has it says nothing about quotas, and permissions nothing about a read-only mount.
    """
    config = machine.config
    yield folder_row("out_dir", config.train.out_dir, RUN_BYTES, FAIL, "set OUT_DIR to a folder with space")
    cache = node.cache_folder(config.data.cache_dir)
    yield folder_row("cache_dir", cache, CACHE_BYTES, FAIL, "set data.cache_dir=FOLDER")
    yield folder_row("temp", tempfile.gettempdir(), CACHE_BYTES, FAIL, "set TMPDIR to a folder with space")
    bad = FAIL if machine.compiles else WARN
    inductor = machine.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor_folder()
    fix = "set TORCHINDUCTOR_CACHE_DIR to a folder that allows it; COMPILE_ENABLED=0 runs without"
    yield folder_row("inductor cache", inductor, CACHE_BYTES, bad, fix, code=True)
    home = machine.environ.get("TRITON_HOME") or Path.home()
    triton = machine.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache"
    fix = "set TRITON_CACHE_DIR to a folder that allows it; KERNELS=reference runs without"
    yield folder_row("triton cache", triton, CACHE_BYTES, bad, fix, code=True)


def inductor_folder() -> Path:
    """Where torch.compile keeps its code by default."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without an entry in passwd
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"


def folder_row(name: str, path: str | Path, nbytes: int, bad: str, fix: str, code: bool = False) -> Row:
    """The row of one folder, which need not exist yet: then its nearest parent is tried. Nothing is left behind.

    nbytes: what must fit. bad: the status when it cannot be used. code: compiled code must be loadable from it.
    """
    path = Path(path).expanduser().absolute()
    try:
        there = nearest(path)
        free = shutil.disk_usage(there).free
        if why := try_folder(there, nbytes, code):
            return Row(name, bad, f"{path}: {why}; {size(free)} free", fix)
    except OSError as err:
        return Row(name, bad, f"{path}: {err.strerror or err}", fix)
    made = "" if there == path else " (will be made)"
    return Row(name, OK, f"{path}{made}: {size(free)} free, {size(nbytes)} reserved and written")


def nearest(path: Path) -> Path:
    """`path` or its nearest parent that exists. FileNotFoundError for a link that leads nowhere."""
    while not path.exists():
        if path.is_symlink():
            raise FileNotFoundError(errno.ENOENT, f"a link to {os.readlink(path)}, which is not there")
        path = path.parent
    return path


def try_folder(folder: Path, nbytes: int, code: bool) -> str:
    """Why a file of `nbytes` cannot be made in `folder`, read back and (code) mapped executable; empty when it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name where the system allows it: never left behind
            reserve(file, nbytes)
            file.seek(0)
            file.write(b"pgolf" * 1000)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read(5000) != b"pgolf" * 1000:
                return "what is read is not what was written"
            if code and hasattr(mmap, "PROT_EXEC"):
                return _no_code(file)
    except OSError as err:
        return _why(err, nbytes)
    return ""


def reserve(file: BinaryIO, nbytes: int) -> None:
    """Allocates `nbytes` for the file: takes quota and space at once, mostly without writing."""
    try:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except (AttributeError, OSError) as err:  # AttributeError: macOS, Windows
        if isinstance(err, OSError) and err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        for _ in range(0, nbytes, 1 << 20):
            file.write(bytes(1 << 20))


def _no_code(file: BinaryIO) -> str:
    try:
        with mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC):
            return ""
    except OSError:  # what loading a compiled library would meet
        return "mounted noexec: compiled code cannot be loaded from it"


def _why(err: OSError, nbytes: int) -> str:
    known = {
        errno.ENOSPC: f"no space for {size(nbytes)}",
        errno.EDQUOT: f"a disk quota leaves no {size(nbytes)}, whatever df says",
        errno.EROFS: "mounted read-only",
        errno.EACCES: "no permission to write",
        errno.ENOTDIR: "not a folder",
        errno.EFBIG: f"files of {size(nbytes)} are not allowed (ulimit -f)",
    }
    return known.get(err.errno, err.strerror or str(err))


def shared_memory(machine: Machine) -> Iterator[Row]:
    """/dev/shm, which NCCL and workers use between processes."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Row("/dev/shm", NONE, "not on this system")
        return
    total, _, free = shutil.disk_usage(path)
    text, several = f"{size(free)} of {size(total)} free", max(len(machine.gpus), machine.ranks_here) > 1
    if free < SHM_LOW and several:
        yield Row("/dev/shm", WARN, f"{text}; NCCL needs more", "docker run --shm-size=8g, or --ipc=host")
    else:
        yield Row("/dev/shm", OK, text)


def open_files(machine: Machine) -> Iterator[Row]:
    """How many files a process may have open."""
    try:
        import resource
    except ImportError:
        yield Row("open files", NONE, "not on this system")
        return
    soft, hard = (n if n != resource.RLIM_INFINITY else 1 << 62 for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    text = "unlimited" if soft == 1 << 62 else f"{soft:,} allowed"
    if soft < FILES_LOW:
        yield Row("open files", WARN, f"{text}, expected {FILES_LOW:,}", f"ulimit -n {min(hard, 65536)}")
    else:
        yield Row("open files", OK, text)


# -- torchrun --------------------------------------------------------------------------------------------------------


def ranks(machine: Machine) -> Iterator[Row]:
    """torchrun's variables, against each other and against the visible GPUs."""
    from pgolf.dist import Rank  # needs torch, which may be what is broken

    env, gpus = machine.environ, len(machine.gpus)
    world = env.get("WORLD_SIZE", "")
    try:
        me = Rank.from_environ("cpu", env)
    except PgolfError as err:
        yield Row("ranks", FAIL, str(err).splitlines()[0], str(err).splitlines()[-1])
        return
    if not world:
        one = "one process" + (f" on one of {gpus} GPUs" if gpus > 1 else "")
        start = f"torchrun --standalone --nproc_per_node={gpus} train_gpt.py uses all"
        yield Row("ranks", WARN if gpus > 1 else OK, f"{one}, not started by torchrun", start)
        return
    lost = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in env]
    if me.world_size > 1 and lost:
        what = f"WORLD_SIZE={world}, but {', '.join(lost)} not set"
        yield Row("ranks", FAIL, what, "start with torchrun, or unset WORLD_SIZE")
    elif gpus and machine.config.train.device != "cpu" and machine.ranks_here > gpus:
        what = f"{machine.ranks_here} processes on this machine, {gpus} visible GPU{'s' * (gpus > 1)}"
        yield Row("ranks", FAIL, what, f"torchrun --standalone --nproc_per_node={gpus} train_gpt.py")
    else:
        yield Row("ranks", OK, f"{me.world_size} in all, {machine.ranks_here} on this machine")


CHECKS: dict[str, Check] = {
    "cores": cores,
    "memory": memory,
    "folders": folders,
    "/dev/shm": shared_memory,
    "open files": open_files,
    "ranks": ranks,
}
