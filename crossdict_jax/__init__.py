"""Which features do two language models share? Dictionaries, maps between them, and proof.

Rooms are imported on first use, so that ``import crossdict_jax`` stays quick.
"""

import importlib


def __getattr__(name: str):
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # something that a room itself needs
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
