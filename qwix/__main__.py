"""`python -m qwix` is the command `qwix`."""

from qwix.cli import main

main()
