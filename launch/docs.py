"""Writes the generated pages of the documentation anew, from the tables and from a finished run.

python -m launch.docs --workdir=runs/quickstart
"""

from launch import command


def main(config, work):
    from crossdict_jax import studies
    from crossdict_jax.report.docs import write_docs

    studies.every()  # whose result files docs/results.md describes too
    for path in write_docs(work, command.ROOT):
        print(path)


if __name__ == "__main__":
    command.run(main)
