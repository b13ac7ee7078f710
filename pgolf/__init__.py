"""pgolf: tiny language models under a byte and a time budget, with the kernels to make them fast."""

__version__ = "0.1.0"
