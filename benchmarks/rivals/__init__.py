"""Jobs of other fault-tolerance tools: NVIDIA's resiliency extension and torchft, with the same model and data.

These modules run in a separate environment, `.venv-rivals`, and import nothing of this package. Only `environment` runs
in the benchmark itself.
"""
