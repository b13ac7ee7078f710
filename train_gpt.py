"""Trains, packs and scores one model: `python train_gpt.py --help`, or under torchrun with one process a GPU."""

import sys

from pgolf.cli import main

if __name__ == "__main__":
    sys.exit(main())
