"""ZZHNet tiny on LEVIR-CD: building change, 0.5 m, 445 / 64 / 128 pairs of 1024x1024.

  python train.py --config configs/zzhnet_tiny_levir.py --data.root LEVIR-CD --run-dir runs/levir

For one accelerator with 16 GB, in bfloat16; on several, the batch is split among them and
--data.batch-size may grow with their number. It has not been run to its end yet, so that no score
can be given here.
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
        run_dir="runs/zzhnet_tiny_levir",
        model=ModelSpec("zzhnet_tiny", overrides={"dtype": "bfloat16"}),
        data=DataConfig(
            batch_size=16,
            crop_size=256,
            workers=8,
            cache_megabytes=1024,
            augmentation=AugmentConfig(change_share=0.5),
        ),
        train=TrainConfig(
            steps=40_000,
            log_every=50,
            validate_every=2_000,
            checkpoint_every=1_000,
            loss=LossConfig(cross_entropy=1.0, lovasz=0.75),
        ),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.05, ema_decay=0.999),
    )
