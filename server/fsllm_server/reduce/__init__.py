"""The reducers: acknowledged updates on disk become the next version on disk, block by block."""


class Stopped(Exception):
    """Reading or folding was asked to stop; nothing of it is visible. Here, so that catching it loads no numpy."""
