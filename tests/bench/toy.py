"""A case of two lines, and candidates that cheat on it."""

from bench.cases import Case


def toy_ref(x, w):
    return x * w, (x * x).sum(-1)


TOY = Case(
    op="toy",
    name="toy",
    inputs=lambda make, n: {"x": make.randn(n, 6), "w": make.randn(6)},
    fn=toy_ref,
    ref=toy_ref,
    sizes={"small": {"n": 5}},
    grads=("x", "w"),
    traffic=lambda n, item: (n * 6 * item, 2 * n * 6 * item),
)


def remembering(key):
    """Computes once a key; hands out copies, so that nobody can spoil what it keeps."""
    known = {}

    def candidate(x, w):
        if key(x) not in known:
            known[key(x)] = toy_ref(x, w)
        return tuple(t.clone() for t in known[key(x)])

    return candidate


def writing(x, w):
    out = toy_ref(x, w.clone())
    w.data.mul_(1.5)
    return out
