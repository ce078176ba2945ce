"""What runs in the processes of a job.

| Module | What it has |
|---|---|
| `job` | the script of every job, and its options |
| `fit` | the training |
| `training` | the module, and callbacks that report its steps |
| `gpt` | the model, its data, and a fingerprint of its state |
| `stopwatch` | times of the training thread and of the mirror thread |
| `cpu_account` | CPU time of a rank by section of a step and by thread |
| `profiled` | calls and times of both threads by file |
| `census` | what the protocol of a rank sends |
| `async_save` | torch's `async_save`, for comparison |
"""
