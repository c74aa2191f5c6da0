"""Judge the maps of models: `python evaluate.py --help` says how. The same as the command `interp-evaluate`."""

import sys

from interp_models.commands.evaluate import script

if __name__ == "__main__":
    sys.exit(script())
