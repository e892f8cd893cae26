"""G10: the same seed gives the same bits, from reading text to scoring maps; another does not."""

import hashlib
import shutil
from pathlib import Path

import jax
import numpy as np

from crossdict_jax import dictionaries, maps, models, modules
from crossdict_jax.activations.extract import extract
from crossdict_jax.dictionaries.train import train_dictionaries
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.workdir import Workdir, write_jsonl

SMALL = {"width": 64, "k": 8, "steps": 40, "batch_size": 256, "architecture": "batchtopk"}


def gate(*, seed: int, directory: Path) -> list[Check]:
    folders = [directory / name for name in ("first", "again", "other")]
    first, again = (_bits(seed, folder) for folder in folders[:2])
    shutil.copytree(folders[0] / "activations", folders[2] / "activations")
    other = _bits(seed + 1, folders[2])  # of the same rows: reading text draws nothing
    drawn = ("dictionaries", "maps", "scores")
    changed = sum(first[part] != other[part] for part in drawn)
    return [
        *(Check(f"{part}: same bits twice", first[part] == again[part], "==", 1) for part in first),
        Check(f"of {', '.join(drawn)}: changed by another seed", changed, "==", len(drawn)),
    ]


def _bits(seed: int, directory: Path) -> dict[str, str]:
    """Returns checksums of all that a run makes; kept activations are not read again."""
    config = lab.lm_config(
        models.EMBEDDED, documents=40, kinds=("ridge", "mlp"), seed=seed, **SMALL
    )
    config.map.steps, config.map.hidden = 40, 32
    work = Workdir(directory)
    store = extract(config, work)
    train_dictionaries(config, store, work)
    write_jsonl(work.result("transfer.jsonl"), lab.transfer_rows(config, store, work))
    folders = [work.dictionary(m, s) for m in store.models for s in store.sites_of(m)]
    params = [modules.split(maps.load(task.path(work)))[1] for task in maps.tasks(config, store)]
    for of_map in params:
        del of_map["dictionary"]  # which is not the map's own
    parts = {
        "activations": [repr(sorted(store.meta["checksums"].items())).encode()],
        "dictionaries": [modules.fingerprint(dictionaries.load(f)).encode() for f in folders],
        "maps": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)],
        "scores": [work.result("transfer.jsonl").read_bytes()],
    }
    return {name: hashlib.sha256(b"".join(part)).hexdigest() for name, part in parts.items()}
