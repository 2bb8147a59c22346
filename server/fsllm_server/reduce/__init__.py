"""The reducers: acknowledged updates on disk become the next version on disk, block by block."""
