"""Writes a finished run's report, one self-contained html file, and prints its path.

python -m launch.report --workdir=runs/ab
"""

from crossdict_jax.workdir import understood
from launch import command


def main(config, work):
    from crossdict_jax import studies
    from crossdict_jax.report.page import write_report
    from crossdict_jax.report.terminal import summary_table

    with understood(work.results, mend="if nobody has changed a file there, please report this"):
        summary_table(work)
        print(write_report(config, work, sections=studies.sections(work)))


if __name__ == "__main__":
    command.run(main)
