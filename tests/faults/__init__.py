"""Every fault that one machine can have, injected into real runs; `python -m tests.faults --full` prints the table."""
