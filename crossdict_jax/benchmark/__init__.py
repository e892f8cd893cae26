"""How fast and how good: the same rows and settings in turns, others in processes of their own."""
