"""Jobs of other fault-tolerance tools: NVIDIA's resiliency extension and torchft, with the same model and data.

`nvrx`, `torchft` and `supervisor`, which starts their processes, run in a separate environment, `.venv-rivals`, and
import nothing of this package. Only `environment` runs in the benchmark itself.
"""
