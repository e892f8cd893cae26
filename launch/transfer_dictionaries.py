"""Uses each model's dictionaries for the others: as they are, and as a start of training.

python -m launch.transfer_dictionaries --workdir=runs/ab

Prints what moved dictionaries explain and how many training steps they save; the curves are in the
report. Needs a run whose dictionaries are trained.
"""

from launch import command

main = command.study("dictionary_transfer")

if __name__ == "__main__":
    command.run(main)
