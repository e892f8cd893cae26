"""What causal tests depend on, as digests: a finished file with the same ones is left as it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config, identity
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Task
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir


def digests(config: Config, work: Workdir, store: Store, tasks: list[Task]) -> dict[str, str]:
    """Returns {input: digest} of the maps, their dictionaries, the store and the settings.

    Raises:
      UserError: a checkpoint is missing or altered: its own checksum is verified.
    """
    targets = {work.dictionary(task.target, task.site_target) for task in tasks}
    sources = {work.dictionary(task.source, task.site_source) for task in tasks}
    folders = targets | sources | {task.path(work) for task in tasks}
    return {
        "config": digest_of(identity(config)),
        "store": digest_of(store.meta),
        **{str(f.relative_to(work.root)): _seal(f) for f in sorted(folders)},
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(value: Any) -> str:
    """Returns the digest of a JSON value, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True))


def _seal(folder: Path) -> str:
    step = checkpoint.latest_step(folder)
    if step is None:
        raise UserError(f"{folder} holds no finished checkpoint; run the stage that writes it.")
    checkpoint.verify(folder, step)
    return digest((folder / f"{step}.sha256.json").read_text())
