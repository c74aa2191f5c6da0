"""Train a model: `python train.py --help` says how. The same as the command `interp-train`."""

import sys

from interp_models.commands.train import script

if __name__ == "__main__":
    sys.exit(script())
