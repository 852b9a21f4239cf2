"""Other systems on the same workloads, each in its own environment, as its documentation would do it."""
