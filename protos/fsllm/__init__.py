"""fsllm: the contract on the wire."""
