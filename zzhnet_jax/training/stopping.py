"""A request to stop, as schedulers send it some seconds before they end a process."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Notices SIGTERM while it is entered; a second one ends the process as ever.

    Attributes:
      requested: whether it has come.
    """

    def __init__(self) -> None:
        """Takes notice of nothing yet."""
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        # Only the main thread may; in another, as of a notebook, nothing is noticed.
        if threading.current_thread() is threading.main_thread():
            # None where a handler was not set from Python, as JAX's is between several processes.
            before = signal.signal(signal.SIGTERM, self._notice)
            self._before = signal.SIG_DFL if before is None else before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
