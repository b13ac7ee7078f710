"""Makes the top-level folder `kernels/` importable as `pgolf.kernels`.

The folder has no `__init__.py` on purpose: a PyPI package of the name `kernels` exists, and this way neither shadows
the other. A checkout has it beside `pgolf/`, a wheel inside (setup.py maps it to `pgolf/kernels/`).
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(next(p for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()))]
