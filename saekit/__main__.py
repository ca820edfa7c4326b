"""`python -m saekit` is the command `saekit`."""

from saekit.cli import main

main()
