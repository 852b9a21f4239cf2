"""`python -m atoll` is the command `atoll`."""

from atoll.start import main

main()
