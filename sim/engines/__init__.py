"""How a simulated federation runs: in this process, in worker processes, on Ray."""
