"""Change probabilities of image pairs of any size, by one compiled function of fixed shape.

Tiles of consecutive pairs share batches, so a folder of small images runs as full batches, and a
scene of any size needs device memory for two batches of tiles: one computed, one prepared.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zzhnet_jax.data.pipeline import normalize
from zzhnet_jax.errors import CheckpointError, ConfigError, DataError
from zzhnet_jax.evaluation import change_mask
from zzhnet_jax.models import functional

from .tiling import Tiling, check_tile, fit_tile

Sample = Mapping[str, Any]
ChangeNetwork = Any
"""An `nnx.Module` with a `card`; it maps two images to logits or a dict with `change`."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What `predict` found.

    Attributes:
      mask: uint8 (h, w), 1 where the probability reaches the threshold.
      probability: float32 (h, w) in [0, 1].
    """

    mask: np.ndarray
    probability: np.ndarray


class Predictor:
    """Computes change probabilities of image pairs; compiled once for all of them.

    Attributes:
      batch_size: tiles computed at a time, by all devices; it bounds the memory.
    """

    def __init__(
        self,
        model: ChangeNetwork,
        *,
        tile_size: int = 256,
        overlap: int = 64,
        batch_size: int = 4,
        flips: bool = False,
        exchange_dates: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """Prepares a network.

        Args:
          model: a change network with its `card`; used as in evaluation mode.
          tile_size: side of the tiles; best the crop size of training.
          overlap: least number of pixels that neighbouring tiles share.
          batch_size: tiles computed at a time.
          flips: average over the images as they are, flipped either way, and both (4 x the work).
          exchange_dates: average over both orders of the dates (2 x the work).
          devices: each takes `batch_size` tiles at a time; JAX's default device alone if None.

        Raises:
          ConfigError: a size that makes no tiling.
        """
        if batch_size < 1:
            raise ConfigError("batch_size", batch_size, "at least 1")
        check_tile(tile_size, overlap)
        devices = devices or []
        self.tile_size, self.overlap = tile_size, overlap
        self.batch_size = batch_size * max(len(devices), 1)
        self._card = model.card
        graphdef, params, stats = functional.split(model)
        options = dict(graphdef=graphdef, flips=flips, exchange_dates=exchange_dates)
        if len(devices) > 1:
            mesh = Mesh(np.array(devices), ("tiles",))
            params, stats = jax.device_put((params, stats), NamedSharding(mesh, PartitionSpec()))
            self._forward = partial(_on_every_device, params, stats, mesh=mesh, **options)
        else:
            params, stats = jax.device_put((params, stats), devices[0] if devices else None)
            self._forward = partial(_change_probability, params, stats, **options)

    def probability(self, pre: np.ndarray, post: np.ndarray) -> np.ndarray:
        """Change probability of one pair.

        Args:
          pre: the earlier image, uint8 (h, w, c).
          post: the later one, same shape.

        Returns:
          float32 (h, w) in [0, 1].

        Raises:
          DataError: the images differ in size, or are not what the network takes.
          CheckpointError: the network tells no change, or answers NaN.
        """
        ((_, probability),) = self.stream([{"pre": pre, "post": post}])
        return probability

    def stream(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
        """Change probabilities of many pairs, in order; only a few pairs are held at a time.

        Args:
          samples: mappings with `pre`, `post` and anything else, for example `name`.

        Yields:
          Each sample as it came, and its change probability float32 (h, w).

        Raises:
          DataError, CheckpointError: as in `probability`, naming the sample.
        """
        unfinished: deque[_Canvas] = deque()
        running: tuple[list[_Tile], jax.Array] | None = None
        tiles = self._tiles(samples, unfinished)
        while batch := list(islice(tiles, self.batch_size)):
            result = self._launch(batch)  # returns at once: blending goes on meanwhile
            if running:
                _blend(*running)
            running = batch, result
            while unfinished[0].missing == 0:
                yield unfinished.popleft().result()
        if running:
            _blend(*running)
        for canvas in unfinished:
            yield canvas.result()

    def _tiles(self, samples: Iterable[Sample], opened: "deque[_Canvas]") -> "Iterator[_Tile]":
        for sample in samples:
            _check(sample, bands=len(self._card.mean))
            tiling = Tiling(sample["pre"].shape[:2], self.tile_size, self.overlap)
            canvas = _Canvas(sample, tiling)
            opened.append(canvas)
            yield from (_Tile(canvas, index) for index in range(len(tiling)))

    def _launch(self, tiles: "list[_Tile]") -> jax.Array:
        """Starts the network on up to a batch of tiles; the rest of the batch stays zero."""
        shape = (self.batch_size, self.tile_size, self.tile_size, len(self._card.mean))
        pair = []
        for date in ("pre", "post"):
            images = np.zeros(shape, np.float32)
            for place, tile in zip(images, tiles, strict=False):
                place[:] = normalize(tile.cut(date), self._card.mean, self._card.std)
            pair.append(images)
        return self._forward(*pair)


@dataclass(eq=False)
class _Canvas:
    """The map of one pair while its tiles are computed."""

    sample: Sample
    tiling: Tiling
    values: np.ndarray = field(init=False)
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.values = np.zeros(self.tiling.shape, np.float32)
        self.missing = len(self.tiling)

    def result(self) -> tuple[Sample, np.ndarray]:
        if not np.isfinite(self.values).all():
            raise CheckpointError(
                f"the network's answer to {_name(self.sample)} is not a number: its weights are"
                " damaged or its training diverged; use another checkpoint"
            )
        return self.sample, np.clip(self.values, 0, 1, out=self.values)


@dataclass(frozen=True, eq=False)
class _Tile:
    canvas: _Canvas
    index: int

    def cut(self, date: str) -> np.ndarray:
        return self.canvas.tiling.cut(self.canvas.sample[date], self.index)


def _blend(tiles: list[_Tile], probabilities: jax.Array) -> None:
    """Waits for a batch and adds it to its maps."""
    for tile, values in zip(tiles, np.asarray(probabilities), strict=False):
        tile.canvas.tiling.add(tile.canvas.values, values, tile.index)
        tile.canvas.missing -= 1


def _name(sample: Sample) -> str:
    return sample.get("name", "the image pair")


def _check(sample: Sample, *, bands: int) -> None:
    pre, post, name = sample["pre"], sample["post"], _name(sample)
    for date, image in (("pre", pre), ("post", post)):
        if image.ndim != 3 or image.shape[-1] != bands or image.size == 0:
            raise DataError(
                f"{name}: the {date} image has shape {image.shape}; the network takes (height,"
                f" width, {bands})"
            )
        if image.dtype != np.uint8:
            raise DataError(f"{name}: the {date} image is {image.dtype}; give uint8, 0..255")
    if pre.shape != post.shape:
        sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (pre, post))
        raise DataError(f"{name}: the images are {sizes} pixels; crop or resample them to one grid")


@partial(jax.jit, static_argnames=("graphdef", "flips", "exchange_dates"))
def _change_probability(
    params: functional.Tree,
    stats: functional.Tree,
    pre: jax.Array,
    post: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    flips: bool,
    exchange_dates: bool,
) -> jax.Array:
    """P(any class but 0) of normalised images (b, h, w, c), averaged over views: (b, h, w)."""

    def forward(pair: jax.Array) -> jax.Array:
        output, _ = functional.apply(graphdef, params, stats, pair[0], pair[1])
        if isinstance(output, Mapping):
            if "change" not in output:
                raise CheckpointError(
                    f"this network tells {', '.join(output)}, not change; use a change network"
                )
            output = output["change"]
        return jax.nn.softmax(output.astype(jnp.float32))[..., 1:].sum(-1)

    pair = jnp.stack([pre, post])  # (2, b, h, w, c); axes 2, 3 of it are axes 1, 2 of the result
    flipped = [(), (1,), (2,), (1, 2)] if flips else [()]
    orders = [pair, pair[::-1]] if exchange_dates else [pair]
    if len(flipped) == len(orders) == 1:
        return forward(pair)
    views = [jnp.flip(p, [axis + 1 for axis in axes]) for p in orders for axes in flipped]
    results = jax.lax.map(forward, jnp.stack(views))  # one after the other: memory of one view
    back = [jnp.flip(r, axes) for r, axes in zip(results, flipped * len(orders), strict=True)]
    return jnp.mean(jnp.stack(back), axis=0)


@partial(jax.jit, static_argnames=("mesh", "graphdef", "flips", "exchange_dates"))
def _on_every_device(
    params: functional.Tree,
    stats: functional.Tree,
    pre: jax.Array,
    post: jax.Array,
    *,
    mesh: Mesh,
    **options: Any,
) -> jax.Array:
    """`_change_probability` of an equal share of the images on every device of a mesh."""
    whole, shared = PartitionSpec(), PartitionSpec("tiles")
    run = jax.shard_map(
        partial(_change_probability, **options),
        mesh=mesh,
        in_specs=(whole, whole, shared, shared),
        out_specs=shared,
        check_vma=False,
    )
    return run(params, stats, pre, post)


def predict(
    model: ChangeNetwork,
    pre: np.ndarray,
    post: np.ndarray,
    *,
    threshold: float | None = None,
    tile_size: int = 256,
    overlap: int = 64,
    batch_size: int = 4,
    flips: bool = False,
    exchange_dates: bool = False,
) -> Prediction:
    """Finds what changed between two images of one place.

    For many pairs make one `Predictor`, which is compiled once and fills its batches across pairs.

    Args:
      model: a change network with its `card`, for example from `load_model`.
      pre: the earlier image, uint8 (h, w, 3), any size.
      post: the later image, same shape, same ground.
      threshold: least probability of a changed pixel; None takes that of the model's card.
      tile_size: side of the tiles that a larger image is cut into.
      overlap: least number of pixels that neighbouring tiles share; results are blended there.
      batch_size: tiles computed at a time; it bounds the memory.
      flips: average over four flips.
      exchange_dates: average over both orders of the dates.

    Raises:
      DataError: the images differ in size, or are not what the network takes.
      ConfigError: a threshold outside [0, 1], or a size that makes no tiling.
      CheckpointError: the network tells no change, or answers NaN.
    """
    threshold = model.card.threshold if threshold is None else threshold
    if not 0 <= threshold <= 1:
        raise ConfigError("threshold", threshold, "between 0 and 1")
    tile_size, overlap = fit_tile([pre.shape], tile_size, overlap)
    tiles = len(Tiling(pre.shape[:2], tile_size, overlap))
    predictor = Predictor(
        model,
        tile_size=tile_size,
        overlap=overlap,
        batch_size=min(batch_size, tiles),
        flips=flips,
        exchange_dates=exchange_dates,
    )
    probability = predictor.probability(pre, post)
    return Prediction(change_mask(probability, threshold), probability)
