"""L0 against FVU of every architecture, on planted features and on a run's activations."""
