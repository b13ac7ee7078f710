"""GPUs, a driver and a machine that are not there."""

from types import SimpleNamespace

import torch

from pgolf.config import RunConfig
from pgolf.doctor.rows import Machine

UUID = "4f2a0000-1111-2222-3333-44445555666{}"
H100 = {
    "driver_version": "550.54.15", "clocks.sm": "345", "clocks.max.sm": "1980", "clocks.mem": "2619",
    "clocks.max.mem": "2619", "power.draw": "71.20", "power.limit": "700.00", "power.default_limit": "700.00",
    "temperature.gpu": "31", "clocks_event_reasons.active": "0x0000000000000001",
}  # fmt: skip


class Smi:
    """Answers like nvidia-smi, and refuses a query as a whole for one field that it does not know."""

    def __init__(self, gpus=(H100,), apps=()):
        self.gpus = [{"uuid": f"GPU-{UUID.format(i)}", **g} for i, g in enumerate(gpus)]
        self.apps, self.asked = apps, []

    def __call__(self, *arguments):
        self.asked.append(arguments)
        query, _, fields = arguments[0].partition("=")
        if query == "--list-gpus":
            return "\n".join(f"GPU {i}" for i in range(len(self.gpus)))
        if query == "--query-compute-apps":
            return "\n".join(f"{uuid}, {pid}, {mib}, {name}" for uuid, pid, mib, name in self.apps)
        if not all(f in g for g in self.gpus for f in fields.split(",")):
            return None
        return "\n".join(", ".join(g[f] for f in fields.split(",")) for g in self.gpus)


def no_smi(*arguments):
    return None


def gpu(i=0, name="NVIDIA H100 80GB HBM3", capability=(9, 0), gib=80):
    return SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=gib << 30,
                           multi_processor_count=132, uuid=UUID.format(i))  # fmt: skip


def fake_torch(gpus=(), arches=("sm_80", "sm_90"), cuda="12.8", free_gib=79.5, init_error="", version="2.9.1+cu128"):
    """As much of torch as the checks ask."""

    def init():
        raise RuntimeError(init_error)

    return SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(cuda=cuda),
        device=torch.device,
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91002)),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_properties=lambda i: gpus[i],
            get_arch_list=lambda: list(arches),
            mem_get_info=lambda i: (int(free_gib * 2**30), gpus[i].total_memory),
            init=init,
        ),
    )


def machine(gpus=(), smi=no_smi, environ=None, config=None, **kw):
    """A machine with these GPUs; kw goes to `fake_torch`."""
    return Machine(environ or {}, config or RunConfig(), fake_torch(gpus, **kw), smi=smi)


def one(rows):
    """The only row."""
    (row,) = rows
    return row
