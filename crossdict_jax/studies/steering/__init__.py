"""Text that one model writes with a feature of another model added."""
