"""The fork server, from which workers are forked, and the other processes that it forks."""
