"""The subcommands of ``fsllm``, one file each, imported when they are called."""
