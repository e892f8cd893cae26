"""One loop for everything that is trained, its checkpoints, and the device mesh."""

from crossdict_jax.training.checkpoint import load_meta, load_params, save_module
from crossdict_jax.training.loop import Feed, Trainable, epoch_order, train
from crossdict_jax.training.mesh import make_mesh, shard

__all__ = [
    "Feed",
    "Trainable",
    "epoch_order",
    "load_meta",
    "load_params",
    "make_mesh",
    "save_module",
    "shard",
    "train",
]
