"""The operator's and researcher's command, fsllm."""
