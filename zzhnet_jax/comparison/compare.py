"""Runs every implementation on a case: accuracy, time and memory, one row each."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from zzhnet_jax.errors import ConfigError
from zzhnet_jax.kernels.selective_scan import UnavailableError, selective_scan
from zzhnet_jax.kernels.selective_scan.api import IMPLEMENTATIONS

from .accuracy import ErrorFigures, Growth, compare_all, growth_along_sequence
from .cases import ARGUMENTS, Arrays, Case, Recorded
from .oracle import Reference, reference
from .timing import Program, Timing, compile_program, free_bytes, median, nbytes, run_in_turns


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Attributes:
      implementation: its name.
      reason: why there are no figures; None if there are.
      broken: it started and broke down, which is a failure.
      errors: figures of "y", "state" and every gradient.
      growth: errors of y along the sequence.
      forward, gradient: cost of the scan, and of its gradient with the forward pass that this
        needs; None where not measured.
    """

    implementation: str
    reason: str | None = None
    broken: bool = False
    errors: dict[str, ErrorFigures] = field(default_factory=dict)
    growth: tuple[Growth, ...] = ()
    forward: Timing | None = None
    gradient: Timing | None = None

    @property
    def verdict(self) -> str:
        """One of "pass", "FAIL" and "not run"."""
        if self.reason is not None:
            return "FAIL" if self.broken else "not run"
        return "pass" if all(figures.passed for figures in self.errors.values()) else "FAIL"


@dataclass(frozen=True)
class Comparison:
    """All implementations on one case."""

    case: Case
    rows: tuple[Row, ...]


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of implementations, or all of them if there are none.

    Raises:
      ConfigError: one does not exist.
    """
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ConfigError("--implementations", name, f"one of {', '.join(IMPLEMENTATIONS)}")
    return tuple(names) or tuple(IMPLEMENTATIONS)


class Comparer:
    """Compares implementations on one case after another, compiling each program once a size.

    Args:
      implementations: names, as `check_names` gives them.
      gradients: also compare and time gradients.
      repeats: timed runs of each program, at most.
      seconds: after this long no further round of timed runs begins.
      patient: also run what a case says is slow.
    """

    def __init__(
        self,
        implementations: Sequence[str],
        *,
        gradients: bool,
        repeats: int = 7,
        seconds: float = 1.0,
        patient: bool = False,
    ) -> None:
        self.implementations = tuple(implementations)
        self.gradients, self.repeats, self.seconds = gradients, repeats, seconds
        self.patient = patient
        self._programs: dict[tuple[Any, ...], Program] = {}

    def compare(self, case: Case) -> Comparison:
        """Runs all implementations on a case; those that cannot run say why."""
        oracle = reference(case, gradients=self.gradients)
        arguments, cotangent = jax.device_put((case.arguments, case.cotangent))
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[[], Any]] = {}
        programs: dict[str, tuple[Program, ...]] = {}
        for name in self.implementations:
            try:
                programs[name] = self._compiled(name, case)
                forward, *backward = programs[name]
                own = {f"{name} forward": partial(forward.run, arguments)}
                for program in backward:
                    own[f"{name} gradient"] = partial(program.run, arguments, cotangent)
                results: Arrays = {}
                for call in own.values():
                    results |= jax.device_get(call())
                rows[name] = _row(name, results, oracle)
                calls |= own
            except (UnavailableError, NotImplementedError) as error:
                rows[name] = Row(name, reason=str(error))
            except jax.errors.JaxRuntimeError as error:
                rows[name] = Row(name, reason=str(error).splitlines()[0], broken=True)
        times = run_in_turns(calls, repeats=self.repeats, seconds=self.seconds)
        measured = [
            _timed(row, case, programs[name], times) if row.reason is None else row
            for name, row in rows.items()
        ]
        recorded = [_recorded_row(n, item, case, oracle) for n, item in case.recorded.items()]
        return Comparison(case, (*recorded, *measured))

    def _compiled(self, name: str, case: Case) -> tuple[Program, ...]:
        """The forward program and, where wanted, that of the gradient.

        Raises:
          UnavailableError: it cannot run here, cannot take these arguments, or needs more memory
            than is free.
        """
        if reason := why_not(name, case) or (None if self.patient else case.slow.get(name)):
            raise UnavailableError(reason)
        key = (name, case.shape[1:], case.dtype, case.delta_softplus, *sorted(case.arguments))
        found = []
        for gradient in (False, True)[: 1 + self.gradients]:
            if (*key, gradient) not in self._programs:
                self._programs[*key, gradient] = _compile(name, case, gradient)
            found.append(self._programs[*key, gradient])
        needed, free = max(program.total_bytes for program in found), free_bytes()
        if free is not None and needed > free:
            raise UnavailableError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        return tuple(found)


def why_not(name: str, case: Case) -> str | None:
    """Why an implementation cannot run here or cannot take a case; None if it can."""
    item = IMPLEMENTATIONS[name]
    operands = [case.arguments.get(argument) for argument in ARGUMENTS]
    return item.unavailable() or item.unsupported(*operands, None)


def scan_of(name: str, case: Case) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
    """The scan and its last state as a function of a case's arguments."""

    def scan(arguments: Any) -> tuple[jax.Array, jax.Array]:
        return selective_scan(
            **arguments,
            delta_softplus=case.delta_softplus,
            return_final_state=True,
            implementation=name,
        )

    return scan


def gradient_of(
    scan: Callable[[Any], tuple[jax.Array, jax.Array]],
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    """Gradients of sum(y * cotangent) as a function of arguments and cotangent."""

    def gradient(arguments: Any, cotangent: jax.Array) -> dict[str, jax.Array]:
        _, pull, _ = jax.vjp(scan, arguments, has_aux=True)
        return pull(cotangent)[0]

    return gradient


def _compile(name: str, case: Case, gradient: bool) -> Program:
    scan = scan_of(name, case)
    if gradient:
        return compile_program(gradient_of(scan), case.arguments, case.cotangent)
    return compile_program(
        lambda arguments: dict(zip(("y", "state"), scan(arguments), strict=True)), case.arguments
    )


def _row(name: str, results: Arrays, oracle: Reference) -> Row:
    growth = growth_along_sequence(results["y"], oracle.values["y"], oracle.bounds["y"])
    return Row(name, errors=compare_all(results, oracle), growth=growth)


def _timed(
    row: Row, case: Case, programs: tuple[Program, ...], times: dict[str, list[float]]
) -> Row:
    costs: dict[str, Any] = {}
    for kind, program in zip(("forward", "gradient"), programs, strict=False):
        runs = times[f"{row.implementation} {kind}"]
        costs[kind] = Timing(
            median(runs), len(runs), program.compile_s, program.temp_bytes, traffic(case, kind)
        )
    return dataclasses.replace(row, **costs)


def _recorded_row(name: str, item: Recorded, case: Case, oracle: Reference) -> Row:
    known = {key: x for key, x in item.outputs.items() if key in oracle.values}
    row = _row(name, known, oracle)
    costs: dict[str, Any] = {
        kind: Timing(ms, 1, None, None, traffic(case, kind)) for kind, ms in item.timings.items()
    }
    return dataclasses.replace(row, **costs)


def traffic(case: Case, kind: str) -> int:
    """Bytes of the arguments and results of the scan ("forward") or its gradient."""
    arguments = nbytes(case.arguments)
    if kind == "gradient":
        return 2 * arguments + nbytes(case.cotangent)
    _, b, _, d, _, n = case.shape
    return arguments + nbytes(case.arguments["u"]) + 4 * b * d * n


def worst_gradient(row: Row) -> tuple[str, ErrorFigures] | None:
    """The gradient with the largest error relative to its own largest value."""
    gradients = {name: row.errors[name] for name in ARGUMENTS if name in row.errors}
    if not gradients:
        return None
    return max(gradients.items(), key=lambda item: np.nan_to_num(item[1].max_of_scale, nan=np.inf))
