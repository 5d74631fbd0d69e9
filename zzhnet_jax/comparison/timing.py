"""Time, memory and traffic of compiled programs, and the bandwidth of the machine they run on."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Calls that are shorter are timed several at once: to start one takes a tenth of a millisecond.
_LEAST_SECONDS = 2e-3
_MOST_CALLS = 50
# Three arrays of this many float32, far larger than any cache: of a CPU, and of an accelerator.
_TRIAD_VALUES = (2**24, 2**26)
_TRIAD_TIMES = 5


@dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
      run: calls it.
      compile_s: seconds that tracing and compiling took.
      temp_bytes: memory that it needs beside arguments and results.
      total_bytes: memory with them.
    """

    run: Callable[..., Any]
    compile_s: float
    temp_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Timing:
    """One program's cost at one size.

    Attributes:
      run_ms: median time of a run; None where the program was not run.
      runs: how many there were.
      compile_s: seconds of tracing and compiling; None for recorded programs.
      temp_bytes: memory beside arguments and results; None for recorded programs.
      traffic_bytes: bytes of arguments and results, each counted once: what no implementation can
        avoid moving.
    """

    run_ms: float | None
    runs: int
    compile_s: float | None
    temp_bytes: int | None
    traffic_bytes: int

    @property
    def gigabytes_per_second(self) -> float | None:
        """Unavoidable traffic over time; what an implementation moves beyond it lowers this."""
        return self.traffic_bytes / self.run_ms / 1e6 if self.run_ms else None


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a function for the arguments it will be given."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temp = memory.temp_size_in_bytes if memory else 0
    others = memory.argument_size_in_bytes + memory.output_size_in_bytes if memory else 0
    return Program(compiled, seconds, temp, temp + others)


def free_bytes() -> int | None:
    """Memory that a program on the first device can still have; None where that isn't known."""
    statistics_of = jax.devices()[0].memory_stats()
    if statistics_of and "bytes_limit" in statistics_of:
        return statistics_of["bytes_limit"] - statistics_of.get("bytes_in_use", 0)
    try:
        lines = dict(line.split(":") for line in open("/proc/meminfo"))
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def milliseconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Time of a call; of short ones the mean of several, started without waiting for each.

    Args:
      call: starts the work.
      wait: waits for what the last call returned.
    """

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / calls

    alone = seconds(1)
    calls = min(int(_LEAST_SECONDS / alone), _MOST_CALLS)
    return 1e3 * (seconds(calls) if calls > 1 else alone)


def run_in_turns(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Times calls that take turns, so that other work on the machine disturbs all of them alike.

    Args:
      calls: name -> a call that has run before.
      repeats: rounds at most.
      seconds: no round begins after this long; there is always one.

    Returns:
      Milliseconds of every run of each call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, jax.block_until_ready))
        if time.perf_counter() > end:
            break
    return times


def median(times: list[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(times) if times else None


def nbytes(*trees: Any) -> int:
    """Bytes of all arrays in some trees."""
    return sum(
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(trees)
    )


def measure_bandwidth() -> float:
    """Memory bandwidth of the first device in GB/s: the best of several runs of a stream triad.

    a <- b + 3 c over three large arrays, two read and one written in place of an old one, counted
    as 12 bytes a value, as the STREAM benchmark counts it.
    """

    def triad(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return b + 3 * c

    program = jax.jit(triad, donate_argnums=0, keep_unused=True)
    values = _TRIAD_VALUES[jax.default_backend() != "cpu"]
    a, b, c = (jnp.full(values, value, jnp.float32) for value in (0.0, 1.0, 2.0))

    def run() -> jax.Array:
        nonlocal a
        a = program(a, b, c)
        return a

    jax.block_until_ready(run())
    best = min(milliseconds(run, jax.block_until_ready) for _ in range(_TRIAD_TIMES))
    return 3 * 4 * values / best / 1e6
