"""What both ends of fsllm agree on: plans, tensors, identity, algorithms, pipeline stages, errors and metric names."""

__version__ = "0.1.0"

PROTOCOL_VERSION = 1
"""The wire protocol that this build speaks (``Hello.protocol_version``)."""

PROTOCOL_VERSION_MIN = 1
"""The oldest wire protocol that a server of this build accepts."""
