"""How fast and how good: the same rows and settings in turns, others in their own processes."""
