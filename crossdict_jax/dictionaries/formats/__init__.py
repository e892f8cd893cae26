"""Dictionary folders of other tools and the hub, in and out, one file a format."""
