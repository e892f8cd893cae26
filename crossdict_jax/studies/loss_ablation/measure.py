"""What each loss of the trained map is good for: alone, left out, and all, at equal budget."""

from dataclasses import asdict, replace
from itertools import chain

from crossdict_jax import maps, results
from crossdict_jax.activations.store import open_store
from crossdict_jax.activations.text import SPLITS
from crossdict_jax.config import Config, LossWeights, identity
from crossdict_jax.errors import UserError
from crossdict_jax.evaluation.scoring import make_bench, score
from crossdict_jax.maps.base import map_class
from crossdict_jax.maps.fit import Loader
from crossdict_jax.report.tables import show
from crossdict_jax.studies.loss_ablation import TABLE, tables
from crossdict_jax.training.stage import Stage, input_digests
from crossdict_jax.workdir import Workdir

KIND = "mlp"
BASELINES = ("mean", "ridge")


def ablations(weights: LossWeights) -> dict[str, LossWeights]:
    """Returns {name: weights}: all losses, each alone, and all but each."""
    used = {name: w for name, w in asdict(weights).items() if w}
    if len(used) < 2:
        raise UserError(
            f"map.loss_weights has {len(used)} losses above 0; give two or more, to compare them."
        )
    made, nothing = {"all": weights}, dict.fromkeys(asdict(weights), 0.0)
    made |= {f"only {n}": LossWeights(**nothing | {n: w}) for n, w in used.items()}
    if len(used) > 2:
        made |= {f"without {n}": replace(weights, **{n: 0.0}) for n in used}
    return made


def run(config: Config, work: Workdir) -> None:
    """Trains the mlp of aligned pairs once per ablation, writes ablation.jsonl, and prints it.

    Mean and ridge stand beside them. Only the weights differ from the run's settings, and without
    mse the head (``NetworkMap.fit``). Without the sparsity loss the thresholds of a jumprelu head
    stay at their start: nothing else trains them.
    """
    store = open_store(work.activations)
    kinds = replace(config, map=replace(config.map, kinds=(KIND,)))
    tasks = [task for task in maps.tasks(kinds, store) if task.pairing == "aligned"]
    folders = [folder for task in tasks for folder in task.folders(work)[:2]]
    inputs = input_digests(work, settings=identity(config), store_meta=store.meta, folders=folders)
    stage = Stage(work, "ablate_losses", files=(TABLE.file,), inputs=inputs)
    if not stage.finished:
        loader = Loader(config, store, work)
        problems = [loader.problem(task) for task in tasks]
        splits = ({split: loader.rows(task, split) for split in SPLITS} for task in tasks)
        benches = [make_bench(some, config.evaluation, seed=config.seed) for some in splits]
        directory, rows = work.maps / "ablation", {task: [] for task in tasks}
        fits = [("none", kind, config.map, directory) for kind in BASELINES]
        for name, weights in ablations(config.map.loss_weights).items():
            settings = replace(config.map, loss_weights=weights)
            fits.append((name, KIND, settings, directory / name.replace(" ", "-")))
        kept = [name for column in TABLE.columns for name in column.names]
        for losses, kind, settings, folder in fits:
            fitted = map_class(kind).fit(problems, settings, seed=config.seed, directory=folder)
            for task, bench, result in zip(tasks, benches, fitted):
                row = results.pair_columns(task) | score(result.map, bench).row()
                row |= {"map": kind, "pairing": "aligned", "losses": losses}
                rows[task].append({name: row[name] for name in kept})
        stage.finish({TABLE.file: [*chain(*rows.values())]}, maps=len(tasks))
    show(tables(results.read(work, TABLE.file)))
