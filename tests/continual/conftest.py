"""Sequences draw many pictures, which one test looks at."""

from tests.pictures import blank_pictures

__all__ = ["blank_pictures"]
