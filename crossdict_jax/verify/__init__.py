"""The gates: planted truths through the whole machine, with what must come out."""
