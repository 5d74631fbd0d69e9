"""Judges a run's weights as it goes on, and keeps the best of them as the run's model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from PIL.Image import Image

from zzhnet_jax.data.sources import Source
from zzhnet_jax.evaluation import json_ready
from zzhnet_jax.models import functional, io

from .config import ExperimentConfig
from .logging import MetricsLog, NoLog
from .processes import is_first
from .program import Program
from .sharding import compile_gather
from .state import TrainState
from .stopping import StopRequest
from .validation import validate, warm_up


class Judge:
    """Validates the weights of a run.

    Attributes:
      best: the best validation so far, as in metrics.json; None before the first.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        program: Program,
        source: Source,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        """Takes what does not change from step to step.

        Args:
          config: the experiment; its run folder receives the best model and its predictions.
          program: what unpacks parameters and knows the network's structure.
          source: the validation pairs.
          stop: a request to end early.
          say: prints a line.
        """
        self._config, self._program, self._source = config, program, source
        self._stop, self._say = stop, say
        self._run_dir = Path(config.run_dir)
        self.best: dict[str, Any] | None = None

    def compile(self, state: TrainState, mesh: Mesh) -> None:
        """Compiles what `validate` needs for states like this one."""
        self._gather = compile_gather(_judged(state), mesh)

    def warm_up(self, state: TrainState) -> None:
        """Predicts one pair, so that the first validation compiles nothing."""
        warm_up(self._model(state), self._source, self._config.data)

    def validate(
        self, step: int, state: TrainState, log: MetricsLog | NoLog, *, last: bool
    ) -> float | None:
        """Judges the weights; the best so far become the run's model.

        Args:
          step: number of the step that gave the state.
          state: the state.
          log: receives the figures and the picture.
          last: a request to stop is ignored.

        Returns:
          F1; None if the request to stop came meanwhile.
        """
        model = self._model(state)
        result = validate(
            model,
            self._source,
            self._config.data,
            pictures=self._config.train.pictures if is_first() else 0,
            stop=lambda: self._stop.requested and not last,
        )
        if result is None:
            return None
        figures = json_ready(result.metrics)
        log.row(step, "val", figures)
        if result.picture:
            log.picture(step, result.picture)
        f1 = figures["f1"] or 0.0  # without any changed pixel there is no F1
        best = self.best["f1"] or 0.0 if self.best else -1.0
        if f1 > best:
            self.best = {"step": step, **figures}
            self._keep(model, figures["threshold"], result.picture)
        self._say(
            f"step {step}: validation F1 {f1:.4f} at threshold {figures['threshold']:.3f}"
            + (", the best so far" if f1 > best else f", best {best:.4f}")
        )
        return f1

    def _model(self, state: TrainState) -> Any:
        """The network with the state's weights, as it is validated and exported."""
        packed, stats = self._gather(_judged(state))
        params = self._program.packing.unpack_on_host(packed)
        model: Any = functional.merge(self._program.graphdef, params, stats)
        data = self._config.data
        model.card = dataclasses.replace(model.card, mean=data.mean, std=data.std)
        return model

    def _keep(self, model: Any, threshold: float, picture: Image | None) -> None:
        """Writes the run's model and picture, from the first process alone."""
        if is_first():
            card = dataclasses.replace(model.card, threshold=threshold)
            io.save_model(model, self._run_dir / "model", card=card)
        if picture:  # none but the first process was asked for one
            picture.save(self._run_dir / "predictions.png")


def _judged(state: TrainState) -> tuple[Any, Any]:
    """What of a state makes the network that is validated and exported."""
    return state.best_params, state.batch_stats
