"""Dictionaries that others trained, put where a run keeps its own."""

import filecmp
import os
from pathlib import Path

from crossdict_jax import modules
from crossdict_jax.activations.extract import dictionary_sites
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import base, formats
from crossdict_jax.dictionaries.base import find, from_arrays
from crossdict_jax.dictionaries.folders import hook_name, site_of
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site, load_config
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir, model_names

OF_RELU = ("W_enc", "b_enc", "W_dec", "b_dec", "scale", "scale_out")  # parameters


def adopt(config: Config, store: Store, work: Workdir) -> set[str]:
    """Saves the dictionaries of ``sae.sources`` as the run's; returns the models that have all.

    UserError: see ``check_sources``; then none is saved.
    """
    for folder, path in check_sources(config, work, store).items():
        dictionary, codes = formats.load(path), config.sae.source_codes
        if codes == "relu":  # whatever selects or shrinks relu(z) is left out
            arrays = modules.split(dictionary)[1]
            kept = {name: arrays[name] for name in OF_RELU if name in arrays}
            dictionary = from_arrays(find("relu"), kept, transcodes=dictionary.transcodes)
        model, site = folder.parts[-3:-1]
        meta = {"source": path, "codes": codes, "model": model, "site": site}
        meta["path"] = store.paths[store.models.index(model)]
        if dictionary.transcodes:
            meta["writes"] = list(map(str, store.output_of(model, Site.parse(site))))
        base.save(dictionary, folder, meta=meta)
    return {m for m, source in zip(store.models, config.sae.sources) if source != "train"}


def check_sources(config: Config, work: Workdir, store: Store | None = None) -> dict[Path, str]:
    """Returns {folder: path} of the dictionaries of ``sae.sources`` that the run does not have yet.

    Reads each. Sizes of rows are those of the store, or else of the models' configs.

    Raises:
      UserError: there is not one entry per model; or a source is missing, is no dictionary that a
        run can keep, is of another model or site, or reads or writes rows of another size.
    """
    sources, names = config.sae.sources, model_names(config.models)
    if not sources:
        return {}
    if len(sources) != len(names):
        raise UserError(
            f"sae.sources has {len(sources)} entries for {len(names)} models; give one for each, "
            "`train` where it shall be trained."
        )
    given, models, missing = dict(zip(names, sources)), dict(zip(names, config.models)), {}
    sizes = {n: store.d_model(n) if store else load_config(p).d_model for n, p in models.items()}
    for reads, writes in dictionary_sites(config, names).writes.items():
        (model, site), folder = reads, work.dictionary(*reads)
        path = given[model].replace("{layer}", str(site.layer))
        if path == "train" or checkpoint.is_finished(folder):
            continue
        dictionary = formats.load(path)
        base.architecture_of(dictionary)  # none of ours has no checkpoint
        if dictionary.transcodes != (writes != reads):
            kind = "a transcoder" if dictionary.transcodes else "no transcoder"
            raise UserError(
                f"sae.sources: {path} is {kind}; sae.output_site must name what it writes, and "
                "be empty for dictionaries that write what they read."
            )
        ends = (("reads", dictionary.d_model, *reads), ("writes", dictionary.d_out, *writes))
        for verb, size, name, end in ends:
            if size != sizes[name]:
                raise UserError(
                    f"sae.sources: {path} {verb} rows of {size}, {name} has {sizes[name]} at "
                    f"{end}; name the dictionary of this model, or correct sae.output_site."
                )
        if config.sae.source_names == "check":
            check_names(formats.names(path), path, models[model], site, writes[1])
        missing[folder] = path
    return missing


def check_names(said: dict[str, str], path: str, model: str, site: Site, written: Site) -> None:
    """Raises UserError if a dictionary says (``formats.names``) that it is of another site.

    Or of another model than that at the path ``model``, of which each part is a name. Two folders
    that are there are one model if their weights are the same.
    """
    wrong = [
        f"{key} {said[key]}, where the run has {ours}"
        for key, ours in (("hook_name", site), ("hook_name_out", written))
        if key in said and site_of(said[key]) != site_of(hook_name(str(ours)))
    ]
    short = [part.removesuffix("-small") for part in model.lower().split("/")]  # gpt2-small is gpt2
    theirs = said.get("model_name", "")
    name = theirs.lower().rstrip("/").rpartition("/")[2].removesuffix("-small")
    same = _same_weights(theirs, model) if theirs else None
    if same is None:
        same = not name or name in short
    if not same:
        wrong.append(f"model {theirs}, where the run has {model}")
    if wrong:
        raise UserError(
            f"sae.sources: {path} says that it is of {' and '.join(wrong)}; name another, or set "
            "sae.source_names=ignore if it is right all the same."
        )


def _same_weights(theirs: str, ours: str) -> bool | None:
    """Returns whether two folders hold the same weights; None where one of them holds none."""
    folders = (Path(os.path.expanduser(model)) for model in (theirs, ours))
    try:
        a, b = (sorted(folder.glob("*.safetensors")) for folder in folders)
        same = [file.name for file in a] == [file.name for file in b]
        same = same and all(p.samefile(q) or filecmp.cmp(p, q, shallow=False) for p, q in zip(a, b))
    except (OSError, ValueError):  # a name that no path can have
        return None
    return same if a and b else None
