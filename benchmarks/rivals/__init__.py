"""Jobs that others keep alive: NVIDIA's resiliency extension and torchft, with the same model and data.

The files run in an environment of their own, `.venv-rivals`: what they import of this repository needs nothing that is
ours, and `environment` alone belongs to the benchmark.
"""
