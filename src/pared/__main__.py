"""`python -m pared` is the command `pared`."""

from pared.cli import main

main()
