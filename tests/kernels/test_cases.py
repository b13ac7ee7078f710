"""Every case of `bench/cases`: values, gradients, determinism, registration, the compiled graph. On a CPU the kernels
run in Triton's interpreter, on a GPU natively."""

import itertools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import CASES
from bench.check import check, evaluate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [
    pytest.param(c, s, d, id=f"{c.id}-{s}-{str(d)[6:]}")
    for c in CASES
    for s in c.sizes
    if s != "production"
    for d in c.dtypes
]
ONCE = [pytest.param(c, next(s for s in c.sizes if s != "production"), id=c.id) for c in CASES]

pytestmark = pytest.mark.usefixtures("kernels_on")


@pytest.mark.parametrize("case, size, dtype", SMALL)
def test_values_and_gradients(case, size, dtype, poisoned):
    check(case, size, DEVICE, dtype)


@pytest.mark.parametrize("case, size", ONCE)
def test_two_runs_are_bit_equal(case, size):
    runs = [evaluate(case, case.fn, case.make(size, DEVICE, case.dtypes[0])) for _ in range(2)]
    for what, value in runs[0].items():
        assert torch.equal(value, runs[1][what]), what


class Calls(TorchDispatchMode):
    """Collects the calls of pgolf's ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pgolf":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case, size", ONCE)
def test_opcheck(case, size):
    """Schema, fake, autograd registration and dynamic shapes of every op that the case calls, backward included."""
    with Calls() as seen:
        evaluate(case, case.fn, case.make(size, DEVICE, case.dtypes[0]))
    assert seen.calls, "no pgolf op was called"
    for func, group in itertools.groupby(sorted(seen.calls, key=lambda c: str(c[0])), key=lambda c: c[0]):
        _, args, kwargs = next(group)
        if "_bwd" in str(func):  # first derivatives only: what it was given from the forward's inputs needs none
            args = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("case, size", ONCE)
def test_compiled_graph_holds_the_op(case, size):
    """fullgraph=True, eager's numbers, and the op is a node of the forward and (with gradients) the backward graph."""
    torch._dynamo.reset()  # cases of one op are one function to Dynamo, which gives up after 8 recompilations
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(case.fn, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    eager = evaluate(case, case.fn, case.make(size, DEVICE, case.dtypes[0]))
    got = evaluate(case, compiled, case.make(size, DEVICE, case.dtypes[0]))
    for what, value in eager.items():
        torch.testing.assert_close(got[what], value, msg=lambda m, what=what: f"{what}: {m}")
    assert len(graphs) == (2 if case.grads else 1)
    for graph in graphs:
        assert any(called(n).startswith("pgolf.") for n in graph.graph.nodes), graph.graph


def called(node) -> str:
    """The op of a graph node, also of one that mutates, which AOTAutograd wraps."""
    wrapped = "auto_functionalized" in str(node.target)
    return str(node.args[0] if wrapped else node.target)
