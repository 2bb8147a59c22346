"""``python -m fsllm_server``: the same as ``fsllm-server``."""

from fsllm_server.cli import main

main()
