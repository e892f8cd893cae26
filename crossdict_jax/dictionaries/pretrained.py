"""Dictionaries that others trained, put where a run keeps its own."""

import numpy as np

from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.dictionaries import base, formats
from crossdict_jax.dictionaries.base import Dictionary, find, from_arrays
from crossdict_jax.dictionaries.folders import hook_name, site_of
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir


def adopt(config: Config, store: Store, work: Workdir) -> set[str]:
    """Saves the dictionaries of ``sae.sources`` as the run's; returns the models that have all.

    Raises:
      UserError: a source is missing, is no dictionary, or reads or writes rows of another size.
    """
    sources = config.sae.sources
    if sources and len(sources) != len(store.models):
        raise UserError(
            f"sae.sources has {len(sources)} entries for {len(store.models)} models; give one for "
            "each, `train` where it shall be trained."
        )
    adopted = {m: s for m, s in zip(store.models, sources) if s != "train"}
    for model, source in adopted.items():
        for site in store.sites_of(model):
            folder = work.dictionary(model, site)
            if checkpoint.is_finished(folder):
                continue
            path = source.replace("{layer}", str(site.layer))
            dictionary, (other, written) = formats.load(path), store.output_of(model, site)
            if dictionary.d_model != store.d_model(model):
                raise UserError(
                    f"sae.sources: {path} reads rows of {dictionary.d_model}, {model} has "
                    f"{store.d_model(model)} at {site}; name the dictionary of this model."
                )
            if dictionary.transcodes != ((other, written) != (model, site)):
                kind = "a transcoder" if dictionary.transcodes else "no transcoder"
                raise UserError(
                    f"sae.sources: {path} is {kind}; sae.output_site must name what it writes, and "
                    "be empty for dictionaries that write what they read."
                )
            if dictionary.d_out != store.d_model(other):
                raise UserError(
                    f"sae.sources: {path} writes rows of {dictionary.d_out}, {other} has "
                    f"{store.d_model(other)} at {written}; correct sae.output_site."
                )
            if config.sae.source_names == "check":
                said, index = formats.names(path), store.models.index(model)
                check_names(said, path, f"{store.paths[index]}/{model}", site, written)
            if config.sae.source_codes == "relu":
                dictionary = unselected(dictionary)
            base.save(dictionary, folder, meta={"source": path, "codes": config.sae.source_codes})
    return set(adopted)


def check_names(said: dict[str, str], path: str, model: str, site: Site, written: Site) -> None:
    """Raises UserError if a dictionary says (``formats.names``) that it is of another site.

    Or of another model than ``model``, of which each part between slashes is a name.
    """
    ends, wrong = {"hook_name": site, "hook_name_out": written}, []
    for key, ours in ends.items():
        if key in said and site_of(said[key]) != site_of(hook_name(str(ours))):
            wrong.append(f"{key} {said[key]}, where the run has {ours}")
    short = [part.removesuffix("-small") for part in model.lower().split("/")]  # gpt2-small is gpt2
    name = said.get("model_name", "").lower().rpartition("/")[2].removesuffix("-small")
    if name and name not in short:
        wrong.append(f"model {said['model_name']}, where the run has {model.rpartition('/')[2]}")
    if wrong:
        raise UserError(
            f"sae.sources: {path} says that it is of {' and '.join(wrong)}; name another, or set "
            "sae.source_names=ignore if it is right all the same."
        )


def unselected(dictionary: Dictionary) -> Dictionary:
    """Returns the dictionary with features relu(z), unselected and without threshold.

    Raises:
      UserError: it does more than that, as some imported ones do.
    """
    base.architecture_of(dictionary)
    names = ["W_enc", "b_enc", "W_dec", "b_dec", "scale"] + ["scale_out"] * dictionary.transcodes
    arrays = {name: np.asarray(getattr(dictionary, name)[...]) for name in names}
    return from_arrays(find("relu"), arrays, transcodes=dictionary.transcodes)
