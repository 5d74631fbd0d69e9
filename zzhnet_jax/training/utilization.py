"""Which share of the devices' peak a training step puts to use."""

from functools import cached_property

from jax.sharding import Mesh

from zzhnet_jax.aot.chips import chip_of
from zzhnet_jax.models.cost import network_cost

from .config import ExperimentConfig


class Utilization:
    """Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B).

    Counted are the multiply-adds of convolutions and matrix products that the network needs, the
    backward pass as twice the forward one; what is computed again to save memory is not counted.
    """

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        """Looks up the devices' peak.

        Args:
          config: the experiment.
          mesh: the devices.
        """
        self._config, self._devices = config, mesh.size
        self._chip = chip_of(mesh.devices.flat[0])

    def figures(self, seconds: float) -> dict[str, float]:
        """`model_flops_utilization` of a step of this time; nothing where the peak is not known."""
        if self._chip is None:
            return {}
        peak = self._chip.narrow_flops if self._is_narrow else self._chip.wide_flops
        return {"model_flops_utilization": self._step_flops / (seconds * self._devices * peak)}

    @property
    def _is_narrow(self) -> bool:
        return self._config.model.compute_dtype == "bfloat16"

    @cached_property
    def _step_flops(self) -> float:
        spec, data = self._config.model, self._config.data
        cost = network_cost(
            spec.name,
            height=data.crop_size,
            width=data.crop_size,
            num_classes=spec.num_classes,
            overrides=dict(spec.overrides),
        )
        return 3.0 * 2.0 * cost.macs * data.batch_size
