"""Training: the loop, calibration, observers, checkpoints, the training log, the methods."""
