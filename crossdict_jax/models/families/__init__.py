"""Families of language models, one file each, named as ``model_type`` of config.json."""
