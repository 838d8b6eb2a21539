"""`python -m edgellm_cupy` is the command `edgellm`."""

from .cli import main

main()
