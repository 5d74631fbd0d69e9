"""Trains a network, as `zzhnet train` does: `python train.py --config configs/<experiment>.py`."""

import sys
from functools import partial

from zzhnet_jax.cli import run
from zzhnet_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(run(partial(main, prog="python train.py"), sys.argv[1:]))
