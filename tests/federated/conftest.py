"""Runs leave pictures that nobody looks at here."""

from tests.pictures import blank_pictures

__all__ = ["blank_pictures"]
