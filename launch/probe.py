"""Trains probes on one model's features of labelled texts and uses them on the other's.

python -m launch.probe --workdir=runs/ab --config.probe.source=labelled.jsonl

Needs a run with dictionaries and maps (launch.experiment). Texts are lines of JSON with the fields
text and label; --config.probe.text and --config.probe.label name others.
"""

from launch import command

main = command.study("probe")

if __name__ == "__main__":
    command.run(main)
