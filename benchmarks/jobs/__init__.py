"""What runs in the processes of a job: the scripts, the model, and what measures inside a rank."""
