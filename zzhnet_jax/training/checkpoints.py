"""Checkpoints for going on after an interruption: state, place in the data, best result.

Orbax writes them in the background, each under a temporary name until it is whole.
"""

import contextlib
import errno
import functools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from zzhnet_jax.errors import CheckpointError

from .processes import from_first, is_first
from .state import TrainState

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REMEDY = "free space and run the same command again to go on from the last whole checkpoint"
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


@dataclass(frozen=True)
class Progress:
    """What a checkpoint holds beside the arrays; all of it is JSON.

    Attributes:
      data: the data iterator's state.
      best: the best validation so far: step, f1, threshold and so on; None before the first.
      seconds: time spent training so far.
      config: the experiment's fields.
      network: the network's own resolved config.
    """

    data: Mapping[str, Any]
    best: Mapping[str, Any] | None
    seconds: float
    config: Mapping[str, Any]
    network: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest few, and the one with the best validation F1."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Opens a folder; what an interrupted save has left in it is removed.

        Args:
          directory: made if missing.
          keep: how many of the newest to keep.
        """
        self.directory = directory.absolute()
        _tell_failures_once()
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics["f1"], n=1, keep_checkpoints_without_metrics=False
        )
        newest = checkpoint_managers.LatestN(keep)
        with _full_disk_in_one_line(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy([newest, best]),
                    cleanup_tmp_directories=True,
                ),
                item_names=("state", "progress"),
            )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def newest_good(self) -> tuple[int | None, list[str]]:
        """The newest checkpoint that can be read; damaged ones after it are put aside.

        The first process reads it whole, before all of them restore it together, so that none can
        fail alone and leave the others waiting.

        Returns:
          Its step, None if there is no checkpoint at all; and what was found on the way, a line for
          each damaged one.

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        found: list[str] = []
        while (step := self.latest_step()) is not None:
            reason = self._damage(step) if is_first() else None
            if not from_first(int(reason is not None)):
                return step, found
            where = self.directory / str(step)
            if len(self._manager.all_steps()) == 1:
                raise CheckpointError(
                    f"{where}: cannot be restored ({reason}) and there is no other checkpoint;"
                    " delete this folder to begin anew, or choose another --run-dir"
                )
            aside = self.directory.parent / f"damaged-checkpoint-{step}"
            if is_first():
                shutil.rmtree(aside, ignore_errors=True)
                where.rename(aside)
            from_first(0)
            self._manager.reload()
            found.append(
                f"{where} cannot be restored ({reason}); it is now {aside.name}, and the checkpoint"
                " before it is used"
            )
        return None, found

    def _damage(self, step: int) -> str | None:
        """Why a checkpoint cannot be read; None if it can. Asked by the first process alone."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="damage"
        )
        folder = self.directory / str(step)
        try:
            json.loads((folder / "progress" / "metadata").read_text())
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
                tree = reader.metadata(folder / "state").item_metadata.tree
                to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=to_numpy))
        except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
            return str(error).strip().splitlines()[0][:200]
        return None

    def save(self, step: int, state: TrainState, progress: Progress, *, f1: float | None) -> None:
        """Starts to write a checkpoint and returns as soon as the state may be changed.

        Args:
          step: steps done.
          state: arrays to write.
          progress: everything else.
          f1: validation F1 of this very state; None if it was not validated.

        Raises:
          CheckpointError: the disk is full, now or while the one before was being written.
        """
        self._check_space(state)
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(asdict(progress)),
                ),
                metrics=None if f1 is None else {"f1": f1},
            )

    def progress(self, step: int) -> Progress:
        """The part of a checkpoint that is not arrays."""
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress(**self._restore(step, args)["progress"])

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The arrays of a checkpoint, placed as `abstract` says.

        Raises:
          CheckpointError: it cannot be read, or its arrays have other names or shapes.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._restore(step, args)["state"]

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: the disk was full.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    def _check_space(self, state: TrainState) -> None:
        """Looks before it writes: nothing is left behind, and it is known at once."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
        free = shutil.disk_usage(self.directory).free / 2**20
        if free < needed:
            raise CheckpointError(
                f"{self.directory}: the disk is full, a checkpoint takes {needed:.1f} MiB"
                f" and {free:.1f} are left; {_REMEDY}"
            )

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be restored ({reason}); delete this folder"
                " to go on from the checkpoint before, or choose another --run-dir"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _full_disk_in_one_line(self.directory):
                yield
        except CheckpointError:
            for leftover in self.directory.glob("*orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            raise


@functools.cache
def _tell_failures_once() -> None:
    """What is raised is not printed as well, by whoever noticed it first or too late."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_raised_too)
    sys.unraisablehook = functools.partial(_report_unless_late, sys.unraisablehook)


def _not_raised_too(record: logging.LogRecord) -> bool:
    """Drops what Orbax logs, with a traceback, of errors that it then raises as well.

    It raises the first; asyncio logs those of the other arrays. Also dropped is its wonder at a
    file that belongs to a checkpoint, when only the arrays of one are read.
    """
    if record.name == "asyncio":
        return not (record.exc_info and is_full_disk(record.exc_info[1]))
    wonders = str(record.msg).startswith("Metadata file does not exist")
    return "orbax" not in record.pathname or (record.levelno < logging.ERROR and not wonders)


def _report_unless_late(report: Callable[[Any], None], unraisable: Any) -> None:
    """Drops what TensorStore's threads say of writes that end after another has failed.

    By then Orbax has closed the event loop that waited for them, and raises the failure itself.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that no more can be written.

    TensorStore reports the operating system's error as text alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _full_disk_in_one_line(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise CheckpointError(f"{directory}: the disk is full; {_REMEDY}") from error
