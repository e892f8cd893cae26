"""Results of a run for people: one self-contained html page, and tables on the terminal."""
