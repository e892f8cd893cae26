"""G10: the same seed gives the same bits, from reading text to scoring maps; another does not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from crossdict_jax import dictionaries, maps, models
from crossdict_jax.activations.store import open_store
from crossdict_jax.maps.base import fingerprint, own_parameters
from crossdict_jax.modules import split
from crossdict_jax.verify import lab, real
from crossdict_jax.verify.gate import Gate, equal
from crossdict_jax.workdir import Workdir, write_jsonl

SMALL = {"width": 128, "k": 8, "steps": 60, "batch_size": 256, "architecture": "batchtopk"}


def gate(*, seed: int, directory: Path) -> Gate:
    first, again, other = (
        _bits(s, directory / name) for s, name in ((seed, "1"), (seed, "2"), (seed + 1, "3"))
    )
    same = {part: first[part] == again[part] for part in first}
    parts = ("dictionaries", "maps", "scores")
    return Gate(
        "G10",
        "the same seed, the same bits; another seed, other bits",
        (
            *(equal(f"{part}: the same bits twice", alike, 1) for part, alike in same.items()),
            equal(
                "what another seed changes: dictionaries, maps, scores",
                sum(first[part] != other[part] for part in parts),
                len(parts),
            ),
        ),
        note="The bound of every gate stands in verify.json beside its value.",
    )


def _bits(seed: int, directory: Path) -> dict[str, str]:
    """Returns checksums of all that a run makes."""
    config = real.real_config(
        models.EMBEDDED, documents=40, kinds=("token_ridge", "mlp"), seed=seed, **SMALL
    )
    config.map.steps, config.map.hidden = 60, 32
    work = real.trained(config, directory)
    rows = lab.ladder(config, work)
    write_jsonl(work.result("transfer.jsonl"), rows)
    store = open_store(work.activations)
    folders = [work.dictionary(m, s) for m in store.models for s in store.sites_of(m)]
    return {
        "activations": _of([repr(sorted(store.meta["checksums"].items())).encode()]),
        "dictionaries": _of(fingerprint(dictionaries.load(f)).encode() for f in folders),
        "maps": _of(_parameters(t.path(work)) for t in maps.tasks(config, store)),
        "scores": _of([_file(work, "transfer.jsonl")]),
    }


def _parameters(path: Path) -> bytes:
    import jax

    leaves = jax.tree.leaves(own_parameters(split(maps.load(path))[1]))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def _file(work: Workdir, name: str) -> bytes:
    return work.result(name).read_bytes()


def _of(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
