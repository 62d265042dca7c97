"""What the training scripts share: flags, data, objectives, checkpoints, the loop."""
