"""Measures what maps are worth in paired rows: maps on few rows, the hypernetwork on none.

python -m launch.efficiency --workdir=runs/ab

Needs the activations and dictionaries of a run (launch.extract_activations, launch.train_saes).
"""

from launch import command

main = command.study("efficiency")

if __name__ == "__main__":
    command.run(main)
