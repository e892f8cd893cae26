"""What is measured, a file each; sizes stand in its ``SIZES`` by the name of the suite."""
