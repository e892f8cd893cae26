"""Writes the generated pages of the documentation anew, from the tables and from a finished run.

python -m launch.docs --workdir=runs/quickstart
"""

import importlib
import pkgutil

from launch import command


def main(config, work):
    from crossdict_jax import studies
    from crossdict_jax.report.docs import write_docs

    for study in pkgutil.iter_modules(studies.__path__):  # each registers its result files
        importlib.import_module(f"{studies.__name__}.{study.name}")
    for path in write_docs(config, work, command.ROOT):
        print(path)


if __name__ == "__main__":
    command.run(main)
