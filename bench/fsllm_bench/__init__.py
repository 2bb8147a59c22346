"""Benchmarks, measurements and the embedded demonstration of fsllm."""
