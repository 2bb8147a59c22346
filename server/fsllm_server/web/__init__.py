"""What the web port says of this server: see ``fsllm_common.telemetry.web``."""
