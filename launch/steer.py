"""Lets a model write with a feature of another model put in, beside the same text without it.

python -m launch.steer --workdir=runs/ab --config.steer.feature=17
python -m launch.steer --workdir=runs/ab --config.steer.search=himself --config.steer.samples=32

Needs a run with maps (launch.experiment). Prints the texts side by side and how often the tokens
that the feature promotes occur in each; all of it lies in results/steering/, and launch.report
shows it on its page.
"""

from launch import command

main = command.study("steering")

if __name__ == "__main__":
    command.run(main)
