"""Converts dictionaries between formats, from a folder, a finished run or the hub, and to it.

python -m launch.convert --workdir=exported --config.source=runs/ab
python -m launch.convert --workdir=ours --config.source=hub:OWNER/NAME --config.format=crossdict

The result lies in WORKDIR/dictionaries; --config.push=hub:OWNER/NAME uploads it.
"""

from crossdict_jax.config import ConvertConfig
from launch import command


def main(config, work):
    from crossdict_jax.dictionaries.convert import convert

    for folder in convert(config, work):
        print(folder)


if __name__ == "__main__":
    command.run(main, kind=ConvertConfig, default="convert")
