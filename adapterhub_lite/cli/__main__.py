"""`python -m adapterhub_lite.cli` is the command `adapter`."""

from . import main

main()
