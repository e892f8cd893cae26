"""The commands, one file per verb: python -m launch.experiment and its stages."""
