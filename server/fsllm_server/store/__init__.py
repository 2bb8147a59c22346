"""What the server keeps: records (SQL), versions (immutable blobs), uploads (spools) and the runs' event logs."""
