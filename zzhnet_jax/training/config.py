"""Everything a training run can be told, as frozen dataclasses that check themselves.

A config file is Python with `get_config() -> ExperimentConfig`; the command line replaces any field
by its path.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from zzhnet_jax.data.config import DataConfig
from zzhnet_jax.errors import ConfigError
from zzhnet_jax.models.blocks import RematPolicy


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(name, value, allowed)


@dataclass(frozen=True)
class ModelSpec:
    """Which network to train.

    Attributes:
      name: a preset; `zzhnet models` lists them.
      num_classes: classes of the output; 2 is unchanged and changed.
      compute_dtype: what the network computes in; None is what its preset says. Weights, optimizer
        state and scans are float32 in any case.
      overrides: fields of the preset to replace; on the command line --model.overrides.FIELD VALUE.
    """

    name: str = "zzhnet_nano"
    num_classes: int = 2
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    overrides: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            self.num_classes == 2,
            "model.num_classes",
            self.num_classes,
            "2, unchanged and changed: that is what training judges",
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms; a term of weight 0 is not computed.

    Attributes:
      cross_entropy: mean over labelled pixels.
      lovasz: Lovasz-softmax, a surrogate of the IoU.
      dice: one minus the soft Dice coefficient.
      focal: cross entropy in which confident pixels count less.
      class_weights: weight of each class in the cross entropy; all alike if None.
      focal_gamma: how fast confident pixels fade in the focal term.
    """

    cross_entropy: float = 1.0
    lovasz: float = 0.0
    dice: float = 0.0
    focal: float = 0.0
    class_weights: tuple[float, ...] | None = None
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.lovasz, self.dice, self.focal)
        _require(
            min(weights) >= 0 and max(weights) > 0,
            "train.loss",
            weights,
            "weights of cross_entropy, lovasz, dice, focal: none negative and one positive",
        )
        _require(
            self.class_weights is None or min(self.class_weights, default=0) > 0,
            "train.loss.class_weights",
            self.class_weights,
            "one positive weight a class",
        )
        _require(self.focal_gamma >= 1, "train.loss.focal_gamma", self.focal_gamma, "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, and when to report and save.

    Attributes:
      steps: optimizer steps in all.
      log_every: steps between two lines of metrics.jsonl.
      validate_every: steps between two passes over the validation images; the last step has one.
      checkpoint_every: steps between two checkpoints; every validation has one as well.
      keep_checkpoints: how many of the newest to keep, beside the one with the best validation F1.
      pictures: validation pairs shown in predictions.png.
      loss: weights of the loss terms.
      accumulation: parts that each batch is computed in, one after another, in as many times less
        memory. The gradient is that of the whole batch, for every loss term (with lovasz or dice
        this takes one more forward pass); only BatchNorm sees the parts by themselves.
      remat: what is computed again in the backward pass rather than kept: "none"; "blocks", all of
        a block but its scans; "blocks+scan", these too; "offload", likewise, with the blocks'
        inputs in host memory meanwhile. None is what the network's own config says.
      compilation_cache: folder that keeps compiled programs between runs; None turns it off.
    """

    steps: int = 1000
    log_every: int = 10
    validate_every: int = 200
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    pictures: int = 6
    loss: LossConfig = LossConfig()
    accumulation: int = 1
    remat: RematPolicy | None = None
    compilation_cache: str | None = "~/.cache/zzhnet_jax"

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "validate_every", "checkpoint_every", "accumulation")
        for name in counts:
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "at least 1")
        keep = self.keep_checkpoints
        _require(keep > 0, "train.keep_checkpoints", keep, "at least 1")
        _require(self.pictures >= 0, "train.pictures", self.pictures, "at least 0")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
      learning_rate: the peak.
      schedule: after the warm-up, stay there, fall along a half cosine, or fall in steps.
      warmup_fraction: share of all steps over which the rate rises linearly from 0.
      final_fraction: where the cosine ends, as a share of the peak.
      step_every: steps after which a rate that falls in steps is multiplied by `step_factor`.
      step_factor: between 0 and 1.
      weight_decay: decoupled.
      decayed: "weights" leaves norms, biases, scales and state-space parameters without decay;
        "all" decays everything, as the published ChangeMamba training does.
      beta1: decay of the mean of gradients.
      beta2: decay of the mean of squared gradients.
      epsilon: added to the root of the latter.
      clip_norm: largest global norm of the gradient; None clips nothing.
      ema_decay: decay of the moving average of the weights that validation and export use; 0 uses
        the weights themselves.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_fraction: float = 0.05
    final_fraction: float = 0.01
    step_every: int = 10_000
    step_factor: float = 0.5
    weight_decay: float = 0.05
    decayed: Literal["weights", "all"] = "weights"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "positive")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _require(self.epsilon > 0, "optim.epsilon", self.epsilon, "positive")
        _require(self.step_every > 0, "optim.step_every", self.step_every, "at least 1")
        factor = self.step_factor
        _require(0 < factor <= 1, "optim.step_factor", factor, "above 0 and at most 1")
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optim.{name}", value, "between 0 and 1")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}", value, "at least 0 and below 1")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "positive, or None",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each way of splitting the work gets; one may be -1, all that are left.

    Attributes:
      data: copies of the network, each with its share of the batch.
      fsdp: likewise, and parameters and optimizer state are split among them.
      tensor: parts of the inner channels of scans and MLPs.
      spatial: parts of an image's rows.
      shard_optimizer: split the optimizer's state over `data` as well (ZeRO-1).
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    spatial: int = 1
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        rest = None
        for name in ("data", "fsdp", "tensor", "spatial"):
            value = getattr(self, name)
            _require(
                value == -1 or value > 0, f"mesh.{name}", value, "positive, or -1 for the rest"
            )
            _require(
                value > 0 or rest is None, f"mesh.{name}", -1, f"positive, as mesh.{rest} is -1 too"
            )
            rest = name if value == -1 else rest


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other; not needed where a cluster tells them.

    Attributes:
      coordinator: address and port of process 0, as 10.0.0.1:1234.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds to wait for the others to start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self) -> None:
        address = self.coordinator
        _require(
            address is None or (":" in address and address.rsplit(":", 1)[1].isdigit()),
            "distributed.coordinator",
            address,
            "an address with a port, as 10.0.0.1:1234",
        )
        count, index = self.num_processes, self.process_id
        _require(count is None or count > 0, "distributed.num_processes", count, "at least 1")
        _require(
            index is None or 0 <= index < (index + 1 if count is None else count),
            "distributed.process_id",
            index,
            "at least 0 and below distributed.num_processes",
        )
        _require(self.timeout > 0, "distributed.timeout", self.timeout, "at least 1")


@dataclass(frozen=True)
class ExperimentConfig:
    """One training run.

    Attributes:
      run_dir: folder of this run; rerunning the same command continues what is there.
      init_from: folder of a saved or converted model, or of another run, whose weights a new run
        starts from; it must be the same network. None starts from random weights.
      seed: of the initial weights, the order and augmentation of the data, and drop path.
      model: which network to train.
      data: images, batches and augmentation; data.batch_size is that of all devices together.
      train: length of training, and when to report and save.
      optim: AdamW and its schedule.
      mesh: how the work is split among devices.
    """

    run_dir: str = "runs/default"
    init_from: str | None = None
    seed: int = 0
    model: ModelSpec = ModelSpec()
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "at least 0")
        weights = self.train.loss.class_weights
        _require(
            weights is None or len(weights) == self.model.num_classes,
            "train.loss.class_weights",
            weights,
            f"{self.model.num_classes} weights, one a class",
        )

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of JSON-ready values; tuples become lists."""
        return _json(asdict(self))


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, tuple | list) else value


def load_config(path: str) -> ExperimentConfig:
    """Runs a config file and returns what its `get_config()` gives.

    Raises:
      ConfigError: no such file, or it gives no `ExperimentConfig`.
    """
    file = Path(path)
    _require(file.is_file() and file.suffix == ".py", "--config", path, "a Python file that exists")
    spec = importlib.util.spec_from_file_location(f"zzhnet_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError("--config", path, "a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise ConfigError("--config", path, f"a file that runs ({error})") from error
    get_config = getattr(module, "get_config", None)
    config = get_config() if callable(get_config) else None
    if not isinstance(config, ExperimentConfig):
        raise ConfigError("--config", path, "a file whose get_config() returns an ExperimentConfig")
    return config
