"""Named tensors as a manifest and a payload: description and digest, chunks, and numpy arrays.

``manifest`` and ``chunks`` import no numpy, so that an idle daemon does not hold it; ``arrays`` does.
"""
