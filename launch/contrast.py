"""Asks on which features a preference between two sentences rests, and whether they carry over.

python -m launch.contrast --workdir=runs/ab --config.contrast.source=pairs.jsonl

Needs a run with dictionaries and maps (launch.experiment). Pairs are lines of JSON: BLiMP's
sentence_good and sentence_bad, agreement's clean_prefix, clean_answer and patch_answer, or good and
bad.
"""

from launch import command

main = command.study("contrast")

if __name__ == "__main__":
    command.run(main)
