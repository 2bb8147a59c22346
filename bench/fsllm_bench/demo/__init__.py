"""``fsllm demo``: a real federation of three sites on this machine, compared with what each could do alone."""
