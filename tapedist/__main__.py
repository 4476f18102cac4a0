"""`python -m tapedist`: the same as the `tapedist` command."""

from tapedist.cli import entry_point

entry_point()
