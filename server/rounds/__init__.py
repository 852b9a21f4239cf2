"""One round after the other: who takes part, what comes back, how it is checked and merged."""
