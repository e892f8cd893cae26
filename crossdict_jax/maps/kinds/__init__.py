"""Kinds of map, one file each: ``ridge.py`` is ``map.kinds=ridge``."""
