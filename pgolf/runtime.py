"""What this machine can do, and what follows: dtype, compilation, attention back end, kernel path, each with a reason.
Chosen once, printed once, never changed behind the user's back."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

import torch

from pgolf.errors import SetupError


@dataclass(frozen=True)
class Choice:
    """A value and why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True)
class Runtime:
    """Everything the capability of the machine decides."""

    device: torch.device
    dtype: Choice  # "fp32" | "bf16"
    compile: Choice  # "on" | "off"
    attention: Choice
    kernels: Choice

    @property
    def compute_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype.value]

    def lines(self) -> list[str]:
        """One line a choice, for the log."""
        parts = {"dtype": self.dtype, "compile": self.compile, "attention": self.attention, "kernels": self.kernels}
        head = f"device: {device_name(self.device)}, torch {torch.__version__}, python {platform.python_version()}"
        return [head, *(f"{name}: {c.value} ({c.reason})" for name, c in parts.items())]


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)} (sm_{''.join(map(str, torch.cuda.get_device_capability(device)))})"
        )
    return f"CPU, {torch.get_num_threads()} threads"


def choose(device: torch.device, *, dtype: str = "auto", compile: str = "auto", kernels: str = "auto") -> Runtime:
    """Resolves the "auto" settings on `device`. Raises SetupError when what was asked for cannot be had."""
    cuda = device.type == "cuda"
    return Runtime(device, _dtype(device, dtype), _compile(cuda, compile), _attention(device), _kernels(cuda, kernels))


def _dtype(device: torch.device, asked: str) -> Choice:
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if asked != "auto":
        if asked == "bf16" and device.type == "cuda" and not bf16:
            raise SetupError(
                f"train.dtype=bf16 on {device_name(device)}: bf16 needs compute capability 8.0; use train.dtype=fp32"
            )
        return Choice(asked, "asked for")
    if bf16:
        return Choice("bf16", "compute capability 8.0 or higher")
    return Choice("fp32", "no bf16 on this GPU" if device.type == "cuda" else "bf16 products are far slower on CPUs")


def _compile(cuda: bool, asked: str) -> Choice:
    if asked != "auto":
        return Choice(asked, "asked for")
    if cuda:
        return Choice("on", "GPU")
    return Choice("off", "on a CPU compiling takes longer than it saves in a run of minutes")


def _attention(device: torch.device) -> Choice:
    if device.type != "cuda":
        return Choice("torch SDPA", "CPU")
    missing = "flash-attn 3 is not installed" if importlib.util.find_spec("flash_attn_interface") is None else ""
    return Choice("torch SDPA", missing or "flash-attn 3 is not wired in yet")


def _kernels(cuda: bool, asked: str) -> Choice:
    if asked == "triton":
        raise SetupError("train.kernels=triton: there are no Triton bodies yet; use train.kernels=reference or auto")
    return Choice("reference", "asked for" if asked == "reference" else "plain torch; the Triton bodies come next")
