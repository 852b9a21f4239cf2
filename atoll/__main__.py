"""`python -m atoll` is the command `atoll`."""

from atoll.cli.start import main

main()
