"""The training loop: steps, validation, checkpoints and records.

The host runs one step ahead of the device: while a step computes, the next batch is prepared and
the figures of the step before are read. Whatever decides the sequence of losses (state, place in
the data, random keys by step) is in a checkpoint, so that an interrupted run goes on exactly.
"""

import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from zzhnet_jax.data.pipeline import fingerprint, training_batches
from zzhnet_jax.data.sources import open_source
from zzhnet_jax.errors import CheckpointError, UserError
from zzhnet_jax.evaluation import json_ready
from zzhnet_jax.models import functional, io, registry

from .checkpoints import Checkpoints, Progress, is_full_disk
from .config import ExperimentConfig, ModelSpec
from .environment import describe_environment, enable_compilation_cache, write_json
from .logging import MetricsLog, ProgressDisplay, StepTimer
from .optimizer import decay_mask, make_optimizer, make_schedule
from .packing import Packing
from .resume import check_resumable
from .sharding import check_batch, make_mesh, put_batch
from .state import Build, StateMaker, TrainState
from .step import Metrics, TrainStep, compile_train_step
from .validation import validate, warm_up


class NonFiniteLossError(UserError):
    """The loss or its gradient became infinite or NaN."""


def model_builder(spec: ModelSpec) -> Build:
    """The function that makes a run's network from its random streams."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return registry.create_model(
            spec.name, num_classes=spec.num_classes, rngs=rngs, **spec.overrides
        )

    return build


def train(config: ExperimentConfig, *, build: Build | None = None) -> dict[str, Any]:
    """Trains a network, or goes on with a run that was interrupted.

    Args:
      config: the experiment; `config.run_dir` receives everything.
      build: makes the network; that of `config.model` if None.

    Returns:
      The summary that is also written to metrics.json.

    Raises:
      ConfigError: a field does not fit the data or the devices.
      DataError: the data is missing or damaged.
      CheckpointError: the run folder holds another network's checkpoint, or the disk is full.
      NonFiniteLossError: training diverged.
    """
    enable_compilation_cache(config.train.compilation_cache)
    trainer = None
    try:
        trainer = Trainer(config, build or model_builder(config.model), Console())
        return trainer.run()
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise CheckpointError(
            f"{config.run_dir}: the disk is full; free space and run the same command again"
        ) from error
    finally:
        if trainer:
            trainer.close()


class Trainer:
    """One run, from its first or restored state to its last step.

    Attributes:
      start: steps that were done before; 0 in a new run.
      best: the best validation so far, as in metrics.json; None before the first.
    """

    def __init__(self, config: ExperimentConfig, build: Build, console: Console) -> None:
        """Opens the data and finds the newest checkpoint.

        Args:
          config: the experiment.
          build: makes the network.
          console: where to print.
        """
        self.config, self._build, self._console = config, build, console
        self._run_dir, self._began = Path(config.run_dir), time.perf_counter()
        self._mesh = make_mesh(config.mesh)
        check_batch(config.data.batch_size, self._mesh)
        self._train_source = open_source(config.data, "train")
        self._val_source = open_source(config.data, "val")
        self._batches = training_batches(self._train_source, config.data, seed=config.seed)
        self._graphdef, params, stats = functional.abstract(build)
        self._shapes = params, stats
        self._parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        self._packing = Packing(params, decay_mask(params))
        network: Any = functional.merge(self._graphdef, params, stats)
        self._network = json_ready(dataclasses.asdict(network.config))
        self._checkpoints = Checkpoints(
            self._run_dir / "checkpoints", keep=config.train.keep_checkpoints
        )
        self._timer = StepTimer()
        self._pending: tuple[int, list[str], Metrics] | None = None
        self.start, self._seconds = 0, 0.0
        self.best: dict[str, Any] | None = None
        self._resume()

    def _resume(self) -> None:
        """Takes up the newest checkpoint's place, if there is one; `_prepare` reads its arrays."""
        step = self._checkpoints.latest_step()
        if step is None:
            return
        progress = self._checkpoints.progress(step)
        where = str(self._checkpoints.directory / str(step))
        changes = check_resumable(progress, self.config, self._network, where=where)
        self._batches.set_state(progress.data)
        self.start, self._seconds = step, progress.seconds
        self.best = dict(progress.best) if progress.best else None
        if step < self.config.train.steps:
            self._print(f"going on from step {step} of {self._run_dir}")
            for change in changes:
                self._print(f"  changed since then: {change}")

    def run(self) -> dict[str, Any]:
        """Trains up to the last step and writes the summary, which it returns."""
        if self.start >= self.config.train.steps:
            self._print(f"{self._run_dir} is finished: it has done {self.start} steps")
            self._report_best()
            return self._summary()
        self._describe()
        with self._console.status("compiling the network"):
            state, step = self._prepare()
        self._log = MetricsLog(self._run_dir, first_step=self.start)
        self._display = ProgressDisplay(
            self._console, total=self.config.train.steps, completed=self.start
        )
        with self._display:
            self._timer.restart()
            self._train(state, step)
        self._log.close()
        self._checkpoints.close()
        minutes, seconds = divmod(round(self._elapsed()), 60)
        self._print(f"{self.config.train.steps} steps in {minutes} min {seconds} s")
        self._report_best()
        return self._summary()

    def close(self) -> None:
        """Stops the data's threads and waits for what is being written."""
        self._batches.close()
        self._checkpoints.close()

    def _prepare(self) -> tuple[TrainState, TrainStep]:
        """The state to start from, fresh or restored, and the compiled step."""
        config = self.config
        schedule = make_schedule(config.optim, config.train.steps)
        optimizer = make_optimizer(config.optim, schedule, self._packing.decay_mask)
        maker = StateMaker(
            self._build,
            self._shapes,
            self._packing,
            optimizer,
            self._mesh,
            ema=config.optim.ema_decay > 0,
        )
        side, bands = config.data.crop_size, len(config.data.mean)
        # Compilation runs on one core; the state and the validation program are made meanwhile.
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(
                compile_train_step,
                self._graphdef,
                self._packing,
                optimizer,
                schedule,
                maker.abstract,
                self._mesh,
                image_shape=(config.data.batch_size, side, side, bands),
                loss=config.train.loss,
                ema_decay=config.optim.ema_decay,
            )
            if self.start:
                state = self._checkpoints.restore(self.start, maker.abstract)
            else:
                state = maker.create(jax.random.key(config.seed))
            warm_up(self._model(state), self._val_source, config.data)
            return state, step.result()

    def _model(self, state: TrainState) -> Any:
        """The network with the state's weights, as it is validated and exported."""
        params = self._packing.unpack_on_host(state.best_params)
        model: Any = functional.merge(self._graphdef, params, jax.device_get(state.batch_stats))
        data = self.config.data
        model.card = dataclasses.replace(model.card, mean=data.mean, std=data.std)
        return model

    def _train(self, state: TrainState, train_step: TrainStep) -> None:
        plan = self.config.train
        # Not the key of the initial weights, which the seed alone makes.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        for step in range(self.start + 1, plan.steps + 1):
            batch = next(self._batches)
            arrays = {name: batch[name] for name in ("pre", "post", "label")}
            state, metrics = train_step(state, put_batch(arrays, self._mesh), key)
            self._settle()
            self._pending = step, batch["name"], metrics
            last = step == plan.steps
            due = last or step % plan.validate_every == 0
            if due or step % plan.checkpoint_every == 0:
                self._settle()
                f1 = self._validate(step, state) if due else None
                self._save(step, state, f1)
                self._timer.restart()

    def _settle(self) -> None:
        """Waits for the step before the one just begun, checks it and reports it where due."""
        if self._pending is None:
            return
        step, names, metrics = self._pending
        self._pending = None
        if not metrics["finite"]:
            raise self._diverged(step, names, metrics)
        self._display.advance(step)
        self._timer.tick()
        if step % self.config.train.log_every and step != self.config.train.steps:
            return
        figures = {name: float(value) for name, value in metrics.items() if name != "finite"}
        seconds, pairs = self._timer.read(), self.config.data.batch_size
        figures |= {"step_seconds": seconds, "pairs_per_second": pairs / seconds}
        self._display.report(step, loss=figures["loss"], seconds=seconds, pairs=pairs)
        self._log.row(step, "train", figures)

    def _diverged(self, step: int, names: list[str], metrics: Metrics) -> NonFiniteLossError:
        good = self._checkpoints.latest_step()
        return NonFiniteLossError(
            f"step {step}: loss {float(metrics['loss'])}, gradient norm"
            f" {float(metrics['gradient_norm'])}, on the batch {', '.join(names)}; look at these"
            " images, or lower optim.learning_rate"
            + (f"; the checkpoint of step {good} is good" if good else "")
        )

    def _validate(self, step: int, state: TrainState) -> float:
        """Judges the weights; the best so far become the run's model. Returns F1."""
        model, data = self._model(state), self.config.data
        result = validate(model, self._val_source, data, pictures=self.config.train.pictures)
        figures = json_ready(result.metrics)
        self._log.row(step, "val", figures)
        if result.picture:
            self._log.picture(step, result.picture)
        f1 = figures["f1"] or 0.0  # without any changed pixel there is no F1
        best = self.best["f1"] or 0.0 if self.best else -1.0
        if f1 > best:
            self.best = {"step": step, **figures}
            card = dataclasses.replace(model.card, threshold=figures["threshold"])
            io.save_model(model, self._run_dir / "model", card=card)
            if result.picture:
                result.picture.save(self._run_dir / "predictions.png")
        self._print(
            f"step {step}: validation F1 {f1:.4f} at threshold {figures['threshold']:.3f}"
            + (", the best so far" if f1 > best else f", best {best:.4f}")
        )
        return f1

    def _save(self, step: int, state: TrainState, f1: float | None) -> None:
        progress = Progress(
            data=self._batches.get_state(),
            best=self.best,
            seconds=self._elapsed(),
            config=self.config.to_json(),
            network=self._network,
        )
        self._checkpoints.save(step, state, progress, f1=f1)

    def _describe(self) -> None:
        """Writes down what this run is: its config, its data and where it runs."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self._run_dir / "config.json", self.config.to_json())
        sources = {"train": self._train_source, "val": self._val_source}
        data = {
            split: {"pairs": len(source), "fingerprint": fingerprint(source)}
            for split, source in sources.items()
        }
        record = {"seed": self.config.seed, "data": data, **describe_environment()}
        write_json(self._run_dir / "environment.json", record)
        self._print(
            f"{self.config.model.name}: {self._parameters:,} parameters;"
            f" {len(self._train_source)} training and {len(self._val_source)} validation pairs;"
            f" {self._mesh.size} {self._mesh.devices.flat[0].platform} device(s)"
        )

    def _summary(self) -> dict[str, Any]:
        """What metrics.json holds; it is written here, unless a finished run has it already."""
        path = self._run_dir / "metrics.json"
        if self.start >= self.config.train.steps and path.exists():
            return json.loads(path.read_text())
        summary = {
            "val": self.best,
            "steps": max(self.start, self.config.train.steps),
            "seconds": round(self._elapsed(), 1),
            "model": self.config.model.name,
            "parameters": self._parameters,
        }
        write_json(path, summary)
        return summary

    def _report_best(self) -> None:
        best = self.best or {}
        figures = [
            f"{name.replace('_', ' ')} {best[name]:.4f}"
            for name in ("f1", "iou", "precision", "recall", "threshold")
            if best.get(name) is not None
        ]
        self._print(f"best on validation, step {best.get('step')}: {', '.join(figures)}")
        self._print(f"in {self._run_dir}: model/, predictions.png, metrics.json")

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
