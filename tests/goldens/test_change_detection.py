"""Every array file of the PyTorch originals under ZZHNET_GOLDENS/change_detection: one test a file.

A file is run by the rule for the `kind` in its `config`; nothing is keyed on its name, and a kind
without a rule fails. Outputs and gradients must lie within max(20 times the file's own float32
noise, 1e-5) of the largest reference value.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_case import Case
from golden_networks import run_backbone, run_change, run_change_training, run_vssm
from golden_operators import (
    run_cross_scan,
    run_downsample,
    run_init,
    run_patch_embed,
    run_selective_scan,
    run_ss2d,
    run_vssblock,
)
from golden_training import run_losses, run_metrics, run_optimizer

ROOT = os.environ.get("ZZHNET_GOLDENS")
FILES = sorted(Path(ROOT, "change_detection").glob("*.npz")) if ROOT else []

RUNNERS: dict[str, Callable[[Case], None]] = {
    "selective_scan": run_selective_scan,
    "cross_scan": run_cross_scan,
    "patch_embed": run_patch_embed,
    "downsample": run_downsample,
    "ss2d": run_ss2d,
    "vssblock": run_vssblock,
    "vssm": run_vssm,
    "backbone": run_backbone,
    "init": run_init,
    "cd": run_change,
    "cd_train": run_change_training,
    "losses": run_losses,
    "metrics": run_metrics,
    "optim": run_optimizer,
}


@pytest.mark.skipif(not FILES, reason="set ZZHNET_GOLDENS to a folder with change_detection/*.npz")
@pytest.mark.parametrize("path", FILES or [None], ids=lambda path: path.stem if path else "absent")
def test_golden(path: Path) -> None:
    case = Case(path)
    kind = case.config["kind"]
    assert kind in RUNNERS, f"no rule for files of kind {kind!r}"
    RUNNERS[kind](case)
