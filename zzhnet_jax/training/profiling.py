"""Traces a few steps of a run, for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax

# The first steps of a process wait for memory, caches and the data's threads.
_UNTYPICAL_STEPS = 2


class Profiler:
    """Writes a trace of some steps; a new one for every process that trains.

    Attributes:
      folder: where the traces are.
    """

    def __init__(self, run_dir: Path, steps: int) -> None:
        """Traces nothing yet.

        Args:
          run_dir: the run's folder.
          steps: how many to trace; 0 for none.
        """
        self.folder = run_dir / "profile"
        self._begin = _UNTYPICAL_STEPS if steps else -1
        self._end = self._begin + steps
        self._begun, self._running = 0, False

    def before_step(self, state: object) -> None:
        """Starts or ends the trace where it is time to; call it before every step.

        Args:
          state: what the step before has returned: the trace holds whole steps.
        """
        if self._begun == self._begin:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif self._begun == self._end:
            self.close(state)
        self._begun += 1

    def close(self, state: object = ()) -> None:
        """Ends the trace if it is running, as when training ends before it has all its steps."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
