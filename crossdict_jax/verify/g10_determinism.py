"""G10: the same seed gives the same bits, from reading text to scoring maps; another does not."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, maps, models
from crossdict_jax.activations.extract import extract
from crossdict_jax.maps.base import fingerprint, own_parameters
from crossdict_jax.modules import split
from crossdict_jax.verify import lab, real
from crossdict_jax.verify.gate import Gate, equal
from crossdict_jax.workdir import Workdir, write_jsonl

SMALL = {"width": 64, "k": 8, "steps": 40, "batch_size": 256, "architecture": "batchtopk"}


def gate(*, seed: int, directory: Path) -> Gate:
    folders = [directory / name for name in ("first", "again", "other")]
    first, again = (_bits(seed, folder) for folder in folders[:2])
    shutil.copytree(folders[0] / "activations", folders[2] / "activations")
    other = _bits(seed + 1, folders[2])  # of the same rows: reading text draws nothing
    drawn = ("dictionaries", "maps", "scores")
    changed = sum(first[part] != other[part] for part in drawn)
    twice = [equal(f"{part}: same bits twice", first[part] == again[part], 1) for part in first]
    return Gate(
        "G10",
        "the same seed, the same bits; another seed, other bits",
        (*twice, equal(f"of {', '.join(drawn)}: changed by another seed", changed, len(drawn))),
        note="verify.json holds the bound of every gate beside its value",
    )


def _bits(seed: int, directory: Path) -> dict[str, str]:
    """Returns checksums of all that a run makes; activations that are there are not read again."""
    config = real.real_config(
        models.EMBEDDED, documents=40, kinds=("ridge", "mlp"), seed=seed, **SMALL
    )
    config.map.steps, config.map.hidden = 40, 32
    work = Workdir(directory)
    store = extract(config, work)
    dictionaries.train_dictionaries(config, store, work)
    write_jsonl(work.result("transfer.jsonl"), lab.ladder(config, work))
    folders = [work.dictionary(m, s) for m in store.models for s in store.sites_of(m)]
    return {
        "activations": _of([repr(sorted(store.meta["checksums"].items())).encode()]),
        "dictionaries": _of(fingerprint(dictionaries.load(f)).encode() for f in folders),
        "maps": _of(_parameters(t.path(work)) for t in maps.tasks(config, store)),
        "scores": _of([work.result("transfer.jsonl").read_bytes()]),
    }


def _parameters(path: Path) -> bytes:
    import jax

    leaves = jax.tree.leaves(own_parameters(split(maps.load(path))[1]))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def _of(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
