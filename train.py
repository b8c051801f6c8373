"""Trains one run: ``python train.py --config recipes/digits.yaml --run-dir runs/digits``."""

import sys

from mlomae.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
