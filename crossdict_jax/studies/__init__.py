"""Questions asked of a finished run; nothing below knows them."""
