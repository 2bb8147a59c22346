"""The same rounds on NVIDIA FLARE and on Flower: real deployments with TLS on this machine, alternating with ours."""
