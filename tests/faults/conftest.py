"""The command line in the test's own process."""

from tests.cli.conftest import cli

__all__ = ["cli"]
