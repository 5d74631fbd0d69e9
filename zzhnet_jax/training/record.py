"""What a run writes about itself beside its figures: config, environment, summary."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zzhnet_jax.data.pipeline import fingerprint
from zzhnet_jax.data.sources import Source

from .config import ExperimentConfig
from .environment import describe_environment, write_json


def describe_run(config: ExperimentConfig, sources: Mapping[str, Source]) -> None:
    """Writes config.json and environment.json: the experiment, its data and where it runs.

    Args:
      config: the experiment; its run folder is made if missing.
      sources: name of a split -> its pairs.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config.to_json())
    data = {
        split: {"pairs": len(source), "fingerprint": fingerprint(source)}
        for split, source in sources.items()
    }
    record = {"seed": config.seed, "data": data, **describe_environment()}
    write_json(run_dir / "environment.json", record)


def write_summary(run_dir: Path, summary: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """Writes metrics.json and returns what it holds; with `keep`, one that is there stays."""
    path = run_dir / "metrics.json"
    if keep and path.exists():
        return json.loads(path.read_text())
    write_json(path, summary)
    return summary


def report_best(best: Mapping[str, Any] | None, run_dir: Path, say: Callable[[str], None]) -> None:
    """Says which validation was the best, and where everything lies."""
    best = best or {}
    figures = [
        f"{name.replace('_', ' ')} {best[name]:.4f}"
        for name in ("f1", "iou", "precision", "recall", "threshold")
        if best.get(name) is not None
    ]
    say(f"best on validation, step {best.get('step')}: {', '.join(figures)}")
    say(f"in {run_dir}: model/, predictions.png, metrics.json")
