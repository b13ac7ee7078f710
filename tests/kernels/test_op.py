"""What all ops share: the choice of path, the launch table, recordings, registration."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no kernels to launch")

from pgolf.kernels import _op, _tuned
from pgolf.kernels._tuned import Launch
from pgolf.kernels.residual import residual


def test_path_follows_the_device_unless_set():
    x = torch.ones(2)
    assert not _op.use_kernel("residual", x)
    with _op.paths(residual="triton", mlp="reference"):
        assert _op.use_kernel("residual", x) and not _op.use_kernel("mlp", x)
    assert not _op.use_kernel("residual", x) and not _op.PATHS


def test_table_prefers_the_arch_then_lower_ones(monkeypatch):
    rows = {(0, "*"): 0, (80, "*"): 1, (90, "*"): 2, (90, "D512"): 3, (120, "*"): 4}
    monkeypatch.setitem(_tuned.TABLE, "k", rows)
    got = {}
    for arch in (80, 86, 90, 100, 120):
        with _op.recording(arch):
            got[arch] = (_op.tuned("k", torch.ones(1), "D512"), _op.tuned("k", torch.ones(1), "D64"))
    assert got == {80: (1, 1), 86: (1, 1), 90: (3, 2), 100: (3, 2), 120: (4, 4)}
    assert _op.tuned("k", torch.ones(1), "D512") == 0


def test_no_launch_for_an_older_arch_is_an_error(monkeypatch):
    monkeypatch.setitem(_tuned.TABLE, "k", {(0, "*"): 0, (90, "*"): 2})
    with _op.recording(80), pytest.raises(KeyError, match="no launch for sm_80"):
        _op.tuned("k", torch.ones(1))


def test_every_row_of_the_table_is_a_launch():
    for kernel, rows in _tuned.TABLE.items():
        assert (0, "*") in rows, f"{kernel} cannot be interpreted"
        for (arch, _), how in rows.items():
            assert isinstance(how, Launch) and how.note, (kernel, arch)
            assert how.num_warps in (1, 2, 4, 8, 16) and all(b & (b - 1) == 0 for b in how.blocks.values())


def test_empty_grid_launches_nothing():
    _op.launch(None, (0, 3), torch.empty(0), how=Launch(1, 1))


def test_a_compiled_kernel_on_a_cpu_tensor_is_refused(monkeypatch):
    class Compiled:
        __name__ = "k"

    monkeypatch.setattr(_op.triton, "JITFunction", Compiled)
    with pytest.raises(ValueError, match=r"k: got tensors on cpu, expected cuda; set TRITON_INTERPRET=1"):
        _op.launch(Compiled(), (1,), torch.ones(1), how=Launch(1, 1))


def test_missing_triton_says_how_to_get_it():
    from pgolf.kernels._triton import Missing

    def some_kernel():
        pass

    with pytest.raises(ValueError, match=r"some_kernel: got no triton, .*pip install"):
        Missing(some_kernel)[(1,)]()


def test_recording_runs_nothing_and_shows_every_launch():
    x, w = torch.empty(4, 8, 64, device="meta", requires_grad=True), torch.empty(64, device="meta", requires_grad=True)
    with _op.recording(90) as seen:
        out, normed = residual([x, x], [None, w])
        (out + normed).sum().backward()
    names = [one.kernel.__name__ for one in seen.launches]
    assert names == ["_residual_fwd_kernel", "_residual_bwd_kernel"]
    assert seen.launches[0].grid == (4,) and seen.launches[1].how.num_warps == 8
    assert x.grad.shape == x.shape


def test_recording_holds_the_fake_to_the_op():
    rec = _op.Recording(90)
    meta = lambda *shape: torch.empty(shape, device="meta")
    with pytest.raises(AssertionError, match="fake promises"):
        rec.run(lambda x: meta(2, 3), lambda x: meta(2, 4), (meta(1),))
    with pytest.raises(AssertionError, match="fake promises"):
        rec.run(lambda x: [meta(2, 3)], lambda x: [meta(3, 2).t()], (meta(1),))


@pytest.mark.parametrize("n, expected", [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_pow2(n, expected):
    assert _op.pow2(n) == expected
