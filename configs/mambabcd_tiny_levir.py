r"""MambaBCD tiny on LEVIR-CD by the published ChangeMamba recipe.

  zzhnet convert vssm1_tiny_0230s.pth --model mambabcd_tiny --adapt encoder \
      --allow "encoder.layers.2.blocks.4.*" -o models/bcd_start
  python train.py --config configs/mambabcd_tiny_levir.py --data.root LEVIR-CD \
      --init-from models/bcd_start

The recipe: AdamW at a constant 1e-4 with decay 5e-3 on every parameter, no warm-up, clipping or
average of the weights; 20,000 steps of 16 crops of 256; cross entropy + 0.75 Lovasz-softmax;
balanced crops, flips and quarter turns. Without --init-from the encoder starts from random weights.
The published runs keep the checkpoint that is best on the test images; here validation chooses. For
one accelerator with 40 GB, or several. It has not been run to its end yet, so that no score can be
given here.
"""

from zzhnet_jax.data.config import AugmentConfig, DataConfig
from zzhnet_jax.training.config import (
    ExperimentConfig,
    LossConfig,
    ModelSpec,
    OptimConfig,
    TrainConfig,
)


def get_config() -> ExperimentConfig:
    """The experiment."""
    return ExperimentConfig(
        run_dir="runs/mambabcd_tiny_levir",
        model=ModelSpec("mambabcd_tiny"),
        data=DataConfig(
            batch_size=16,
            crop_size=256,
            workers=8,
            cache_megabytes=1024,
            augmentation=AugmentConfig.changemamba(),
        ),
        train=TrainConfig(
            steps=20_000,
            log_every=50,
            validate_every=500,
            checkpoint_every=500,
            loss=LossConfig(cross_entropy=1.0, lovasz=0.75),
        ),
        optim=OptimConfig(
            learning_rate=1e-4,
            schedule="constant",
            warmup_fraction=0.0,
            weight_decay=5e-3,
            decayed="all",
            clip_norm=None,
            ema_decay=0.0,
        ),
    )
