"""`python -m nogemm`: the same as the `nogemm` command."""

from nogemm.cli import main

main()
