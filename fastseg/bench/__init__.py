"""Time fastseg against what users would pick instead: the same work, side by side.

``works`` lists what is computed and ``peers`` who computes it. ``measure`` runs every peer in a
process of its own, in turn, and compares their outputs; ``report`` draws the page.
"""

from .measure import Entry, Measurement, measure
from .report import html, markdown
from .works import Work, find, list_works

__all__ = ["Entry", "Measurement", "Work", "find", "html", "list_works", "markdown", "measure"]
