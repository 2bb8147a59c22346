"""What each tensor of an adapter is, told from its name. Needs no torch: the daemon asks too."""

from fsllm.v1 import tensors_pb2
from fsllm.v1.tensors_pb2 import TensorRole

_BY_PART = (
    # The first part that occurs in the name decides.
    ("lora_magnitude_vector", tensors_pb2.TENSOR_ROLE_MAGNITUDE),
    ("lora_A", tensors_pb2.TENSOR_ROLE_LORA_A),
    ("lora_B", tensors_pb2.TENSOR_ROLE_LORA_B),
    ("lora_embedding_A", tensors_pb2.TENSOR_ROLE_LORA_A),
    ("lora_embedding_B", tensors_pb2.TENSOR_ROLE_LORA_B),
    ("ia3_l", tensors_pb2.TENSOR_ROLE_SCALE),
    ("prompt_embeddings", tensors_pb2.TENSOR_ROLE_PROMPT),
    ("prompt_encoder", tensors_pb2.TENSOR_ROLE_PROMPT),
)


def tensor_role(name: str) -> TensorRole.ValueType:
    """Return the role of the adapter's tensor ``name`` (a PEFT state-dict name)."""
    parts = name.split(".")
    return next((role for part, role in _BY_PART if part in parts), tensors_pb2.TENSOR_ROLE_OTHER)
