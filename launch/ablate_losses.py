"""Trains the mlp with each loss alone and left out, on a finished run's store and dictionaries.

python -m launch.ablate_losses --workdir=runs/quickstart

Prints a table per direction and pair of sites, writes results/ablation.jsonl, and shows it in the
report when that is made again.
"""

from launch import command

main = command.study("loss_ablation")

if __name__ == "__main__":
    command.run(main)
