"""Architectures of sparse dictionaries, one file each: ``relu.py`` is ``sae.architecture=relu``."""
