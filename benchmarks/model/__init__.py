"""What the projection to thousands of ranks consists of.

| Module | What it has |
|---|---|
| `bare_world` | the transport between processes without a trainer, to calibrate the model |
| `network` | a model of messages between many ranks |
| `modelled_rank` | one rank of a large world, which runs the real decisions with the messages of that model |
"""
