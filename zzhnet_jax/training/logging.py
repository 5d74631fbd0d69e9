"""What a run tells: lines of metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import rich.progress
from PIL import Image
from rich.console import Console

# From this share on, a run is told that its data comes too slowly.
_MUCH_WAITING = 0.1


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard's event files."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        """Opens both.

        Args:
          run_dir: the run's folder.
          first_step: rows of later steps, left by a run that was interrupted, are dropped.
        """
        path = run_dir / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(row for row in rows if _is_before(row, first_step)))
        self._file = path.open("a")
        self._board = _Board(run_dir / "tensorboard", first_step=first_step)

    def row(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Adds the figures of one step."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        figures = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        self._board.scalars(step, {f"{split}/{name}": value for name, value in figures.items()})

    def picture(self, step: int, image: Image.Image) -> None:
        """Adds a picture to TensorBoard."""
        self._board.image(step, "val/predictions", image)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._file.close()
        self._board.close()


class _Board:
    """TensorBoard's event file, written where it is called.

    `tensorboardX.SummaryWriter` writes from a thread of its own, which on a full disk dies with a
    traceback that nobody can catch.
    """

    def __init__(self, directory: Path, *, first_step: int) -> None:
        # Slow: it imports torch where that is installed.
        from tensorboardX import event_file_writer, proto, summary

        self._events, self._summary = proto.event_pb2, summary
        directory.mkdir(parents=True, exist_ok=True)
        self._file = event_file_writer.EventsWriter(str(directory / "events"))
        # Of an earlier part of the run, TensorBoard hides what came after this step.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(first_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds figures under their names."""
        entries = [self._summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step, summary=self._summary.Summary(value=entries))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Adds a picture."""
        pixels = self._summary.image(name, np.asarray(image), dataformats="HWC")
        self._write(step, summary=pixels)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(self._events.Event(step=step, wall_time=time.time(), **content))
        self._file.flush()


class NoLog:
    """Takes what `MetricsLog` takes and writes nothing, for all processes but the first."""

    def row(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Does nothing."""

    def picture(self, step: int, image: Image.Image) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _is_before(row: str, step: int) -> bool:
    """Whether a line is whole and of no later step; the last one may have been cut off."""
    try:
        return json.loads(row)["step"] <= step
    except ValueError:
        return False


class StepTimer:
    """Time per training step since it was last read, without the pauses for validation."""

    def __init__(self) -> None:
        """Starts now."""
        self.restart()

    def wait(self, seconds: float) -> None:
        """Counts time in which the devices had nothing to do."""
        self._waited += seconds

    def waiting(self) -> float:
        """Share of the time since it was last read that such waiting took."""
        return min(self._waited / max(time.perf_counter() - self._start, 1e-9), 1.0)

    def tick(self) -> None:
        """Counts a step."""
        self._steps += 1

    def restart(self) -> None:
        """Forgets the time so far."""
        self._start, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def read(self) -> float:
        """Seconds per step; starts anew."""
        seconds = (time.perf_counter() - self._start) / max(self._steps, 1)
        self.restart()
        return seconds


class ProgressDisplay:
    """A progress bar on a terminal; elsewhere a line for each report."""

    def __init__(self, console: Console, *, total: int, completed: int) -> None:
        """Prepares the display.

        Args:
          console: where to print.
          total: steps in all.
          completed: steps done by an earlier part of the run.
        """
        self._console = console
        self._total = total
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("training"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, *, loss: float, seconds: float, pairs: int, waiting: float) -> None:
        """Shows the figures of a step.

        Args:
          step: its number.
          loss: its loss.
          seconds: time per step.
          pairs: image pairs per step.
          waiting: share of the time in which devices waited for data; shown from a tenth on.
        """
        figures = f"loss {loss:.4f}  {seconds * 1e3:.0f} ms/step  {pairs / seconds:.1f} pairs/s"
        if waiting >= _MUCH_WAITING:
            figures += f"  {waiting:.0%} waiting for data (see --data.workers)"
        self._bar.update(self._task, figures=figures)
        if self._bar.disable:
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self._total - step)))
            self.note(f"step {step}/{self._total}  {figures}  left {left}")

    def note(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
