"""Training: configs, losses, the sharded step, checkpoints and the loop."""
