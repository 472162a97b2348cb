"""The one error this package raises on purpose.

Its message says what was missing or wrong and what to do about it; the command line prints it as one line.
"""

from __future__ import annotations


class DevclusterError(Exception):
    """Something the development cluster needs is missing or did not work."""
