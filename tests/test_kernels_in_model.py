"""The whole model with every op on its kernel, and with weights cast outside the graph: the reference's numbers."""

import dataclasses

import pytest
import torch
from helpers import KERNELS, random_batch, reduced

from pgolf import runtime
from pgolf.data.batch import Batch
from pgolf.errors import SetupError
from pgolf.kernels._op import paths
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective
from pgolf.model.roles import roles_of
from pgolf.presets import PRESETS
from pgolf.quant import fake_quant
from pgolf.quant.config import QuantConfig
from pgolf.quant.weight_cast import WeightCast
from pgolf.schema import KernelsConfig

pytest.importorskip("triton", reason="triton is not installed: no kernels to compare")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, VOCAB = 19, 48
CPU = torch.device("cpu")


def build(preset: str, fold: bool = False) -> GPT:
    """Trained-looking weights: nothing stays at zero, so that every gradient has something to say."""
    model = GPT(reduced(PRESETS[preset]().model, VOCAB), train_length=LENGTH, fold_scales=fold).init_weights(0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return model.to(DEVICE)


def batch() -> Batch:
    b = random_batch(VOCAB, rows=2, length=LENGTH)
    return Batch(b.ids.to(DEVICE), b.targets.to(DEVICE))


def step(model: GPT, preset: str, cast: WeightCast | None = None) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one training step."""
    objective = Objective(PRESETS[preset]().loss, model, DEVICE)
    objective.set_progress(0.3)
    if cast:
        cast.refresh_()
    loss, _ = objective(batch())
    loss.backward()
    if cast:
        cast.collect_()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **grads}


def compare(got: dict, want: dict, rtol: float = 2e-4) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-6)
        assert error < rtol, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("preset", PRESETS)
def test_kernels_give_the_reference_step(preset, kernels_on):
    model = build(preset)
    got = step(model, preset)
    with paths(**dict.fromkeys(KERNELS, "reference")):
        want = step(model, preset)
    compare(got, want)
    assert sum(v.abs().sum() > 0 for v in want.values()) > 20


@pytest.mark.parametrize("op", sorted(KernelsConfig().ops()))
def test_each_op_alone(op, kernels_on):
    """Any one op on its kernel, the others on the reference."""
    model = build("rat_rod_green")
    with paths(**dict.fromkeys(KERNELS, "reference")):
        want = step(model, "rat_rod_green")
        with paths(**{op: "triton"}):
            compare(step(model, "rat_rod_green"), want)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("preset", ["rat_rod_green", "h1", "kitchen_sink_v2"])
def test_weight_cast_gives_the_plain_step(preset, fold):
    """Casts outside the graph, in fp32, with and without folded scales."""
    want = step(build(preset), preset)
    model = build(preset, fold)
    compare(step(model, preset), want)
    cast = WeightCast(model, roles_of(model), QuantConfig(), torch.float32)
    compare(step(model, preset, cast), want)


@pytest.mark.parametrize("fold", [False, True])
def test_quantising_cast_equals_the_slots(fold):
    """Late QAT through the cast: the loss and the straight-through gradients of fake quantisation in the slots."""
    quant = QuantConfig(keep_numel=0)
    model = build("rat_rod_green", fold)
    infos = roles_of(model)
    fake_quant.attach(model, infos, quant)
    want = step(model, "rat_rod_green")
    fake_quant.detach(model)
    plain = step(model, "rat_rod_green")
    cast = WeightCast(model, infos, quant, torch.float32)
    cast.quantize = True
    got = step(model, "rat_rod_green", cast)
    compare(got, want)
    assert abs(plain["loss"] - want["loss"]) > 1e-6 and cast.on_grid > 10


def test_cast_gradients_add_up_over_micro_batches():
    model = build("rat_rod_green", fold=True)
    cast = WeightCast(model, roles_of(model), QuantConfig(), torch.float32)
    objective = Objective(PRESETS["rat_rod_green"]().loss, model, DEVICE)
    once = step(model, "rat_rod_green", cast)
    for _ in range(2):
        (objective(batch())[0] / 2).backward()
        cast.collect_()
    twice = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compare({"loss": once["loss"], **twice}, once)


def test_masters_stay_parameters_and_state_dict_stays_the_same():
    plain, model = build("rat_rod_green"), build("rat_rod_green")
    cast = WeightCast(model, roles_of(model), QuantConfig(), torch.float32)
    assert model.state_dict().keys() == plain.state_dict().keys()
    saved = {n: v.clone() for n, v in plain.state_dict().items()}
    model.load_state_dict({n: v + 1 for n, v in saved.items()})
    cast.refresh_()
    lin = model.blocks[0].attn.q
    torch.testing.assert_close(lin.cast, saved["blocks.0.attn.q.weight"] + 1)
    assert lin.weight.data_ptr() in {m.data_ptr() for c in cast.casts for m in c.bank.master}


def test_cpu_choices_and_their_reasons():
    chosen = runtime.choose(CPU, ops=KernelsConfig().ops())
    assert {c.value for c in chosen.kernels.values()} == {"reference"} and chosen.weight_cast.value == "off"
    (line,) = [text for text in chosen.lines() if text.startswith("kernels")]
    assert "this is a CPU" in line and "mlp" in line and "attention" in line


def test_one_op_overrides_the_default(monkeypatch):
    monkeypatch.setattr(runtime, "_interpreting", lambda: True)
    ops = dataclasses.replace(KernelsConfig(), mlp="reference").ops()
    chosen = runtime.choose(CPU, default_path="triton", ops=ops).kernels
    assert chosen["mlp"].value == "reference" and chosen["residual"].value == "triton"
    assert len(runtime.choose(CPU, default_path="triton", ops=ops).lines()) == 6


def test_kernels_on_a_plain_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(runtime, "_interpreting", lambda: False)
    with pytest.raises(SetupError, match=r"kernels.mlp=triton: kernels need a GPU.*use kernels.mlp=reference or auto"):
        runtime.choose(CPU, ops={"mlp": "triton"})


def as_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(runtime, "device_name", lambda device: "H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return torch.device("cuda", 0)


def test_gpu_choices(monkeypatch):
    """Kernels on, attention on a library's core and by call, weights cast outside the graph; reasons are printed."""
    device = as_h100(monkeypatch)
    chosen = runtime.choose(device, ops=KernelsConfig().ops())
    assert chosen.dtype.value == "bf16" and chosen.compile.value == chosen.weight_cast.value == "on"
    assert chosen.kernels["attention"].value in ("fa3", "cudnn") and chosen.paths["attention"] == "auto"
    assert {c.value for op, c in chosen.kernels.items() if op != "attention"} == {"triton"}
    assert any(
        line.startswith(f"kernels (attention): {chosen.kernels['attention'].value} (") for line in chosen.lines()
    )
    own = runtime.choose(device, ops=KernelsConfig(attention="triton").ops())
    assert own.paths["attention"] == own.kernels["attention"].value == "triton"
    plain = runtime.choose(device, default_path="reference", ops=KernelsConfig(mlp="triton").ops())
    assert plain.paths["attention"] == "reference" and plain.paths["mlp"] == "triton"


def test_gpu_without_triton_says_so(monkeypatch):
    """Never a silent slow path: the reason names the package; asking for kernels is an error."""
    device = as_h100(monkeypatch)
    monkeypatch.setattr(runtime, "triton", None)
    chosen = runtime.choose(device, ops=KernelsConfig().ops())
    assert {c.value for c in chosen.kernels.values()} == {"reference"}
    assert "pip install 'pgolf[cuda]'" in "\n".join(chosen.lines())
    with pytest.raises(SetupError, match="triton is not installed"):
        runtime.choose(device, default_path="triton", ops=KernelsConfig().ops())


def test_a_back_end_that_cannot_run_is_a_setup_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(SetupError, match=r"kernels.attention=fa3: .*compute capability 9.0"):
        runtime.choose(torch.device("cuda", 0), ops=KernelsConfig(attention="fa3").ops())
