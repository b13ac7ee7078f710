"""Packaging. No hardware probing: the same metadata on every machine."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "pgolf/__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="pgolf",
    version=VERSION,
    description="Tiny language models under a byte and a time budget: Triton kernels and a lean training loop",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The folder `kernels/` has no __init__.py, so that it never collides with the PyPI package of that name. In a
    # wheel it becomes pgolf/kernels/, where it shadows the path shim pgolf/kernels.py.
    packages=[*find_packages(include=["pgolf", "pgolf.*"]), "pgolf.kernels"],
    package_dir={"pgolf": "pgolf", "pgolf.kernels": "kernels"},
    py_modules=["train_gpt"],
    entry_points={"console_scripts": ["pgolf = pgolf.__main__:main"]},
    install_requires=[
        "torch>=2.9",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "brotli>=1.1",
        "zstandard>=0.22",
        "safetensors>=0.4",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={
        "cuda": ["triton>=3.5; platform_system == 'Linux'"],
        "data": ["huggingface_hub>=0.25"],
        "submit": ["python-minifier>=3"],  # without it the bundle is stripped only, and a tenth larger
        "test": [
            "python-minifier>=3",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "triton>=3.5; platform_system == 'Linux'",  # no GPU needed: kernels are interpreted and compiled ahead
        ],
        "bench": ["pytest-benchmark>=5"],
    },
)
