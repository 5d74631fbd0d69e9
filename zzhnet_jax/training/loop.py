"""The training loop: steps, validation, checkpoints and records.

The host runs one step ahead of the device: while a step computes, the next batch is prepared and
moved to it, and the figures of the step before are read. Whatever decides the sequence of losses
(state, place in the data, random keys by step) is in a checkpoint, so that an interrupted run goes
on exactly, on as many devices and processes as there are then. Every process runs this loop; the
first one alone prints and writes.
"""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from zzhnet_jax.data.pipeline import training_batches
from zzhnet_jax.data.sources import open_source
from zzhnet_jax.errors import CheckpointError, UserError
from zzhnet_jax.evaluation import json_ready

from .checkpoints import Checkpoints, Progress, is_full_disk
from .config import ExperimentConfig
from .environment import enable_compilation_cache
from .judge import Judge
from .logging import MetricsLog, NoLog, ProgressDisplay, StepTimer
from .processes import is_first, meet, others_alive, steps_may_overlap
from .profiling import Profiler
from .program import Program, model_builder
from .record import describe_run, report_best, write_summary
from .resume import check_resumable
from .sharding import make_mesh, process_share, put_batch
from .state import Build, TrainState
from .step import Metrics, TrainStep
from .stopping import StopRequest
from .utilization import Utilization

__all__ = ["NonFiniteLossError", "Trainer", "model_builder", "train"]


class NonFiniteLossError(UserError):
    """The loss or its gradient became infinite or NaN."""


def train(
    config: ExperimentConfig, *, build: Build | None = None, profile: int = 0
) -> dict[str, Any]:
    """Trains a network, or goes on with a run that was interrupted.

    With several processes (see `processes.connect`) all of them call this alike.

    Args:
      config: the experiment; `config.run_dir` receives everything.
      build: makes the network; that of `config.model` if None.
      profile: steps to write a trace of, into the run's folder.

    Returns:
      The summary that is also written to metrics.json; that of the steps so far where SIGTERM ended
      the run early, after a checkpoint.

    Raises:
      ConfigError: a field does not fit the data or the devices.
      DataError: the data is missing or damaged.
      CheckpointError: the run folder holds another network's checkpoint, or the disk is full.
      NonFiniteLossError: training diverged.
    """
    enable_compilation_cache(config.train.compilation_cache)
    trainer = None
    with others_alive(), StopRequest() as stop:
        try:
            trainer = Trainer(config, build, Console(quiet=not is_first()), stop, profile)
            return trainer.run()
        except OSError as error:
            if not is_full_disk(error):
                raise
            raise CheckpointError(
                f"{config.run_dir}: the disk is full; free space and run the same command again"
            ) from error
        finally:
            if trainer and jax.process_count() == 1:
                trainer.close()


class Trainer:
    """One run, from its first or restored state to its last step.

    Attributes:
      start: steps that were done before; 0 in a new run.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        build: Build | None,
        console: Console,
        stop: StopRequest,
        profile: int = 0,
    ) -> None:
        """Opens the data and finds the newest checkpoint.

        Args:
          config: the experiment.
          build: makes the network; that of `config.model` if None.
          console: where to print.
          stop: a request to end early.
          profile: steps to write a trace of.
        """
        self._profiler = Profiler(Path(config.run_dir), profile if is_first() else 0)
        self.config, self._console, self._stop = config, console, stop
        self._run_dir, self._began = Path(config.run_dir), time.perf_counter()
        self._mesh = make_mesh(config.mesh)
        self._program = Program(config, self._mesh, build)
        self._train_source = open_source(config.data, "train")
        self._val_source = open_source(config.data, "val")
        self._judge = Judge(config, self._program, self._val_source, stop, self._print)
        index, count = process_share(self._mesh)
        self._batches = training_batches(
            self._train_source,
            config.data,
            seed=config.seed,
            process_index=index,
            process_count=count,
        )
        self._network = json_ready(dataclasses.asdict(self._program.network.config))
        self._checkpoints = Checkpoints(
            self._run_dir / "checkpoints", keep=config.train.keep_checkpoints
        )
        self._timer = StepTimer()
        # A network given as `build` has no name by which its operations could be counted.
        self._utilization = None if build else Utilization(config, self._mesh)
        self._pending: tuple[int, list[str], Metrics] | None = None
        self._stopping = False
        self.start, self._seconds = 0, 0.0
        self._resume()

    def _resume(self) -> None:
        """Takes up the newest good checkpoint's place, if any; `_prepare` reads its arrays."""
        step, damaged = self._checkpoints.newest_good()
        for line in damaged:
            self._print(f"warning: {line}")
        if step is None:
            return
        progress = self._checkpoints.progress(step)
        where = str(self._checkpoints.directory / str(step))
        changes = check_resumable(progress, self.config, self._network, where=where)
        self._batches.set_state(progress.data)
        self.start, self._seconds = step, progress.seconds
        self._judge.best = dict(progress.best) if progress.best else None
        if step < self.config.train.steps:
            self._print(f"going on from step {step} of {self._run_dir}")
            for change in changes:
                self._print(f"  changed since then: {change}")

    def run(self) -> dict[str, Any]:
        """Trains up to the last step, or until asked to stop, and returns the summary."""
        steps = self.config.train.steps
        if self.start >= steps:
            self._print(f"{self._run_dir} is finished: it has done {self.start} steps")
            report_best(self._judge.best, self._run_dir, self._print)
            return self._summary(self.start)
        self._describe()
        with self._console.status("compiling the network"):
            state, step = self._prepare()
        self._log = MetricsLog(self._run_dir, first_step=self.start) if is_first() else NoLog()
        self._display = ProgressDisplay(self._console, total=steps, completed=self.start)
        with self._display:
            self._timer.restart()
            done = self._train(state, step)
        self._log.close()
        self.close()
        if done < steps:
            self._print(
                f"asked to stop (SIGTERM): step {done} of {steps} is saved in {self._run_dir};"
                " run the same command to go on"
            )
            return self._summary(done)
        minutes, seconds = divmod(round(self._elapsed()), 60)
        self._print(f"{steps} steps in {minutes} min {seconds} s")
        report_best(self._judge.best, self._run_dir, self._print)
        return self._summary(steps)

    def close(self) -> None:
        """Stops the data's threads and waits for what is being written."""
        self._profiler.close()
        self._batches.close()
        self._checkpoints.close()

    def _prepare(self) -> tuple[TrainState, TrainStep]:
        """The state to start from, fresh or restored, and the compiled step."""
        program = self._program
        # Compilation runs on one core; the state and the validation program are made meanwhile.
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(lambda: program.lower().compile())
            if self.start:
                state = self._checkpoints.restore(self.start, program.maker.abstract)
            elif self.config.init_from:
                state = program.load(self.config.init_from)
            else:
                state = program.maker.create(jax.random.key(self.config.seed))
            self._judge.compile(state, self._mesh)
            meet("state")
            self._judge.warm_up(state)
            compiled = step.result()
        meet("compiled")
        return state, compiled

    def _train(self, state: TrainState, train_step: TrainStep) -> int:
        """Takes the steps that are left; returns the number of the last one."""
        plan = self.config.train
        # Not the key of the initial weights, which the seed alone makes.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        for step in range(self.start + 1, plan.steps + 1):
            self._profiler.before_step(state)
            batch, names = self._next_batch()
            state, metrics = train_step(state, batch, key)
            self._settle()
            self._pending = step, names, metrics
            if not steps_may_overlap():
                self._settle()
            last = step == plan.steps
            due = last or step % plan.validate_every == 0
            if due or step % plan.checkpoint_every == 0 or self._stopping:
                self._settle()
                judge = last or (due and not self._stopping)
                f1 = self._judge.validate(step, state, self._log, last=last) if judge else None
                self._save(step, state, f1)
                self._timer.restart()
            if self._stopping:
                return step
        return plan.steps

    def _next_batch(self) -> tuple[dict[str, jax.Array], list[str]]:
        """The next batch on the devices, and the names of this process's images in it."""
        began = time.perf_counter()
        batch = next(self._batches)
        # What the host waited for cost time only if the devices had finished their step by then.
        idle = self._pending is None or _is_done(self._pending[2]["loss"])
        self._timer.wait(time.perf_counter() - began if idle else 0.0)
        arrays = {"pre": batch["pre"], "post": batch["post"], "label": batch["label"]}
        host = float(self._stop.requested), self._timer.waiting()
        return put_batch(arrays, self._mesh, host=host), batch["name"]

    def _settle(self) -> None:
        """Waits for the step before the one just begun, checks it and reports it where due."""
        if self._pending is None:
            return
        step, names, metrics = self._pending
        self._pending = None
        if not metrics["finite"]:
            raise self._diverged(step, names, metrics)
        self._stopping = self._stopping or bool(metrics["stop"])
        self._display.advance(step)
        self._timer.tick()
        if step % self.config.train.log_every and step != self.config.train.steps:
            return
        flags = ("finite", "stop")
        figures = {name: float(value) for name, value in metrics.items() if name not in flags}
        seconds, pairs = self._timer.read(), self.config.data.batch_size
        figures |= {"step_seconds": seconds, "pairs_per_second": pairs / seconds}
        if self._utilization is not None:
            figures |= self._utilization.figures(seconds)
        self._display.report(
            step, loss=figures["loss"], seconds=seconds, pairs=pairs, waiting=figures["data_wait"]
        )
        self._log.row(step, "train", figures)

    def _diverged(self, step: int, names: list[str], metrics: Metrics) -> NonFiniteLossError:
        good = self._checkpoints.latest_step()
        return NonFiniteLossError(
            f"step {step}: loss {float(metrics['loss'])}, gradient norm"
            f" {float(metrics['gradient_norm'])}, on the batch {', '.join(names)}; look at these"
            " images, or lower optim.learning_rate"
            + (f"; the checkpoint of step {good} is good" if good else "")
        )

    def _save(self, step: int, state: TrainState, f1: float | None) -> None:
        progress = Progress(
            data=self._batches.get_state(),
            best=self._judge.best,
            seconds=self._elapsed(),
            config=self.config.to_json(),
            network=self._network,
        )
        self._checkpoints.save(step, state, progress, f1=f1)

    def _describe(self) -> None:
        """Writes down what this run is, and says it."""
        sources = {"train": self._train_source, "val": self._val_source}
        if is_first():
            describe_run(self.config, sources)
        self._print(
            f"{self.config.model.name}: {self._program.parameters:,} parameters;"
            f" {len(self._train_source)} training and {len(self._val_source)} validation pairs;"
            f" {self._mesh.size} {self._mesh.devices.flat[0].platform} device(s)"
            + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
        )

    def _summary(self, steps: int) -> dict[str, Any]:
        summary = {
            "val": self._judge.best,
            "steps": steps,
            "seconds": round(self._elapsed(), 1),
            "model": self.config.model.name,
            "parameters": self._program.parameters,
        }
        finished = steps >= self.config.train.steps
        if not (finished and is_first()):
            return summary
        return write_summary(self._run_dir, summary, keep=self.start >= self.config.train.steps)

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _is_done(array: Any) -> bool:
    """Whether an array has been computed already."""
    return array.is_ready()
