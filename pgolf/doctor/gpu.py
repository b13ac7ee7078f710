"""Checks of the GPUs' state: free memory, who else is on them, clocks, power and what holds the clocks down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pgolf import neighbours, node
from pgolf.doctor.rows import NONE, OK, WARN, Check, Machine, Row

STATE = {
    "uuid": "uuid",
    "clock_mhz": "clocks.sm",
    "clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "power_default_w": "power.default_limit",
    "temperature_c": "temperature.gpu",
}
# Bits of NVML's clock event reasons; the first two are no fault: idle, and clocks that somebody has set.
REASONS = {
    0x1: "idle",
    0x2: "application clocks are set",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
FAULTS = 0x8 | 0x20 | 0x40 | 0x80


def reasons(text: str | None) -> tuple[int, str]:
    """(bits, words) of nvidia-smi's clock reasons, such as 0x0000000000000004. (0, "") where it says nothing."""
    try:
        bits = int(text or "", 16)
    except ValueError:
        return 0, ""
    words = [word for bit, word in REASONS.items() if bits & bit]
    words += [hex(bits & ~sum(REASONS))] * bool(bits & ~sum(REASONS))
    return bits, ", ".join(words)


def states(machine: Machine) -> dict[str, dict[str, str]]:
    """uuid: nvidia-smi's text for `STATE`, and "reasons", whose name has changed between drivers."""
    rows = {r.get("uuid", ""): r for r in node.smi_gpus(STATE, machine.smi)}
    for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        ask = ("--query-gpu=uuid," + name, "--format=csv,noheader,nounits")
        if text := machine.smi(*ask):
            for line in text.splitlines():
                uuid, _, bits = line.partition(",")
                rows.setdefault(uuid.strip(), {})["reasons"] = bits.strip()
            break
    return rows


def clocks(machine: Machine) -> Iterator[Row]:
    """Clocks, power limit and what holds the clocks down, of each visible GPU."""
    told = states(machine) if machine.gpus else {}
    for i, gpu in enumerate(machine.gpus):
        row = told.get(node.gpu_uuid(gpu))
        if row is None:
            yield Row(
                f"clocks {i}", NONE, "nvidia-smi does not tell (a part of a GPU by MIG, or a container without it)"
            )
        else:
            yield clock_row(f"clocks {i}", row)
    if not machine.gpus:
        yield Row("clocks", NONE, "no CUDA device")


def clock_row(name: str, row: Mapping[str, str]) -> Row:
    """The row of one GPU's state."""
    bits, words = reasons(row.get("reasons"))
    limit, default = node.number(row.get("power_limit_w")), node.number(row.get("power_default_w"))
    text = (
        f"{row.get('clock_mhz')} of {row.get('clock_max_mhz')} MHz, memory {row.get('memory_clock_mhz')} MHz, "
        f"{row.get('power_w')} of {row.get('power_limit_w')} W, {row.get('temperature_c')} C"
    )
    text += f"; {words}" if words else ""
    if bits & FAULTS:
        return Row(name, WARN, text, "cooling or power supply: take another node, or expect a slower run")
    if limit and default and limit < 0.98 * default:
        fix = f"nvidia-smi -pl {default:.0f} (as root), or expect a slower run"
        return Row(name, WARN, f"{text}; the power limit is below the usual {default:.0f} W", fix)
    if bits & 0x2:
        return Row(name, WARN, text, "nvidia-smi -rac and -rgc (as root) put the clocks back")
    return Row(name, OK, text)


# -- memory and processes --------------------------------------------------------------------------------------------


def memory(machine: Machine) -> Iterator[Row]:
    """Free memory of each visible GPU, and who holds the rest. Nobody is stopped."""
    if not machine.gpus:
        yield Row("gpu memory", NONE, "no CUDA device")
        return
    everyone = neighbours.others(machine.ranks_here, machine.smi, machine.proc)
    for i, gpu in enumerate(machine.gpus):
        free, total = machine.torch.cuda.mem_get_info(i)
        uuid = node.gpu_uuid(gpu)
        yield _memory_row(i, free / 2**30, total / 2**30, [p for p in everyone if p.uuid == uuid], machine)
    known = {node.gpu_uuid(g) for g in machine.gpus}
    if odd := [p for p in everyone if p.uuid not in known and p.uuid.startswith("MIG-")]:
        yield Row(
            "gpu memory",
            WARN,
            f"on parts of GPUs (MIG): {neighbours.listed(odd)}",
            "wait for them if they share your part",
        )


def _memory_row(i: int, free: float, total: float, there: list[neighbours.Process], machine: Machine) -> Row:
    name, text = f"gpu {i} memory", f"{free:.1f} of {total:.1f} GiB free"
    if there:
        fix = "wait for it, stop it if it is yours, or choose another GPU with CUDA_VISIBLE_DEVICES"
        return Row(name, WARN, f"{text}; {neighbours.listed(there)}", fix)
    if total - free > neighbours.FOREIGN_GIB and machine.ranks_here == 1:
        what = f"{text}; {total - free:.1f} GiB are held by processes that cannot be seen from here"
        return Row(name, WARN, what, "`nvidia-smi` outside of this container shows them; or choose another GPU")
    return Row(name, OK, f"{text}, no other process")


CHECKS: dict[str, Check] = {"gpu memory": memory, "clocks": clocks}


def under_load(machine: Machine) -> dict[str, Any]:
    """State of the first visible GPU now, for a benchmark that asks while it works: numbers, the reasons in words."""
    row = states(machine).get(node.gpu_uuid(machine.gpus[0]), {}) if machine.gpus else {}
    keep = ("clock_mhz", "clock_max_mhz", "power_w", "power_limit_w", "temperature_c")
    out: dict[str, Any] = {k: node.number(row.get(k)) for k in keep}
    return {**out, "held_by": reasons(row.get("reasons"))[1]}
