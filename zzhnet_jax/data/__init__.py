"""Image pairs: sources, augmentation and the input pipeline; importing it does not import JAX."""

from zzhnet_jax.data.config import (
    AugmentConfig,
    DataConfig,
    JitterConfig,
    Split,
    SyntheticConfig,
)
from zzhnet_jax.data.images import load_image, load_label, load_pair
from zzhnet_jax.data.layout import PairFiles, find_pairs
from zzhnet_jax.data.pairs import Pair, PairInfo, Source
from zzhnet_jax.data.pipeline import Batch, fingerprint, training_batches
from zzhnet_jax.data.sources import FolderSource, open_source
from zzhnet_jax.data.synthetic import SyntheticSource
from zzhnet_jax.data.transforms import augment, normalize

__all__ = [
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "FolderSource",
    "JitterConfig",
    "Pair",
    "PairFiles",
    "PairInfo",
    "Source",
    "Split",
    "SyntheticConfig",
    "SyntheticSource",
    "augment",
    "find_pairs",
    "fingerprint",
    "load_image",
    "load_label",
    "load_pair",
    "normalize",
    "open_source",
    "training_batches",
]
