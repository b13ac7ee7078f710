"""Makes the top-level folder `kernels/` importable as `pgolf.kernels`.

The folder has no `__init__.py` on purpose: a PyPI package of the name `kernels` exists, and this way neither shadows
the other. In a wheel `setup.py` places the folder at `pgolf/kernels/`, a package then, and this shim steps aside.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
