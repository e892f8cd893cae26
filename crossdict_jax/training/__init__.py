"""One loop for everything that is trained, its checkpoints, and the device mesh."""
