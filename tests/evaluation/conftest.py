"""Nobody looks at the pictures of the runs made here."""

from tests.pictures import blank_pictures

__all__ = ["blank_pictures"]
