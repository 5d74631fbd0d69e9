"""Several processes as one run: how they find each other, and what happens when one is lost.

Calls for this that change between versions of JAX stand here alone.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from zzhnet_jax.errors import ConfigError, UserError

from .config import DistributedConfig

# A process that has not been heard of for this long is taken for dead, and the others end.
_SILENCE_SECONDS = 30
# Collective operations between CPUs give up after half a minute; compilation may take longer.
_MEETING_SECONDS = 3600
_LOST = (
    "another process of this run has ended or cannot be reached, so that this one cannot go on"
    " either; see the log of the one that ended first, then start all of them again to continue"
    " from the last checkpoint"
)


class LostProcessError(UserError):
    """Another process of the run is gone."""


def connect(config: DistributedConfig) -> None:
    """Joins the other processes of this run, if there are any; before JAX touches a device.

    By hand, all three fields are given, or the environment variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise JAX finds out by itself under SLURM, Open MPI,
    on TPU VMs and in TPU pods of Kubernetes; where it finds nothing, this process is alone.

    Raises:
      ConfigError: only some of the fields are given, or they do not fit together.
      LostProcessError: the others did not answer in time.
    """
    config = _from_environment(config)
    given = [config.coordinator, config.num_processes, config.process_id]
    by_hand = None not in given
    if not by_hand and given != [None] * 3:
        raise ConfigError(
            "distributed",
            f"coordinator={given[0]}, num_processes={given[1]}, process_id={given[2]}",
            "all three of them, or none",
        )
    if not by_hand and not _found_by_jax():
        return
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _SILENCE_SECONDS}
    if by_hand:
        options |= {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(initialization_timeout=config.timeout, **options)
    except RuntimeError as error:
        where = config.coordinator or "the coordinator"
        reason = str(error).strip().splitlines()[0][:200]
        raise LostProcessError(
            f"{where}: not all processes met within {config.timeout} s ({reason}); start all of"
            " them, and see that this address can be reached from each"
        ) from error


def _from_environment(config: DistributedConfig) -> DistributedConfig:
    """What is not given, from the environment; all three or none."""
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    values = [os.environ.get(name) for name in names]
    given = (config.coordinator, config.num_processes, config.process_id)
    if given != (None, None, None) or None in values:
        return config
    address, count, index = values
    try:
        return DistributedConfig(address, int(str(count)), int(str(index)), config.timeout)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{names[1]} and {names[2]}", (count, index), "numbers") from None


def _found_by_jax() -> bool:
    """Whether JAX would find the other processes by itself, in what a cluster's launcher set."""
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ
    mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    pods = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    # On a TPU VM made by Google's queue the number of hosts is not in the environment.
    tpu_vm = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    skip = "TPU_SKIP_MDS_QUERY" in os.environ
    return slurm or mpi or pods or (tpu_vm and not skip)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """The value that process 0 has; all processes must call this."""
    if jax.process_count() == 1:
        return value
    meet("value")
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def total(counts: np.ndarray) -> np.ndarray:
    """The sum of integers over all processes, exactly; all processes must call this."""
    if jax.process_count() == 1:
        return counts
    meet("counts")
    # JAX cuts 64-bit integers to 32 bits: they travel as two halves.
    wide = counts.astype(np.int64)
    halves = np.stack([wide >> 31, wide & (2**31 - 1)]).astype(np.int32)
    high, low = np.asarray(multihost_utils.process_allgather(halves)).astype(np.int64).sum(0)
    return (high << 31) + low


def meet(place: str) -> None:
    """Waits until every process is there, however long the slowest of them compiles."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(place, timeout=_MEETING_SECONDS)


def steps_may_overlap() -> bool:
    """Whether a step may be sent to the devices before the one before it is known to have worked.

    Where another process is lost, gloo, through which CPUs talk, takes what belongs to the next
    step for an answer to the failed one, and ends the process before it can say why.
    """
    return jax.process_count() == 1 or jax.default_backend() != "cpu"


@contextmanager
def others_alive() -> Iterator[None]:
    """With several processes, ends this one at once when it fails, with what it has to say.

    On the usual way out of a program it would wait for the others, which wait for it. They notice
    within a minute that it is gone, and end as well.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            _leave(f"error: {error}", 2)
        if isinstance(error, KeyboardInterrupt):
            _leave("interrupted", 130)
        if isinstance(error, Exception) and _is_lost(error):
            reason = str(error).strip().splitlines()[0][:200]
            _leave(f"error: {_LOST} ({reason})", 1)
        _leave("".join(traceback.format_exception(error)), 1)


def _is_lost(error: BaseException) -> bool:
    """Whether an error comes from talking to other processes."""
    text = str(error).lower()
    signs = ("gloo", "connection", "unavailable", "heartbeat", "coordination", "deadline",
             "barrier", "nccl", "peer", "aborted")  # fmt: skip
    return any(sign in text for sign in signs)


def _leave(message: str, code: int) -> NoReturn:
    """Prints why, and ends the process without waiting for anything."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
