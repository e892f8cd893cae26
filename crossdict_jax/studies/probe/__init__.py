"""Linear probes trained on one model's features and used on another's."""
