"""Networks with random weights, for conversions."""

import jax
import numpy as np
import pytest

from zzhnet_jax.models import functional, registry


@pytest.fixture(scope="session")
def random_network():
    """Makes networks whose every value is random, without running their initialisation."""

    def make(name, num_classes, *, seed=0, **overrides):
        config = registry.override(registry.preset(name), overrides)
        rng = np.random.default_rng(seed)

        def value(leaf):
            if np.issubdtype(leaf.dtype, np.integer):
                return rng.integers(0, 1000, leaf.shape).astype(leaf.dtype)
            return rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype)

        graphdef, *trees = functional.abstract(
            lambda rngs: registry.build(name, config, num_classes, rngs=rngs)
        )
        return functional.merge(graphdef, *jax.tree.map(value, trees))

    return make
