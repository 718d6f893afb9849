"""Checks and measurements on one GPU: run them with `python -m tools.gpu_check`."""
