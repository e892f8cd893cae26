"""Matrix products and sparse codes: references, and kernels that are measured to win."""
