"""What people and programs are told: reports as text, JSON and HTML, and progress.

Reports are data; nothing here opens a store, plans or computes.
"""

from daskclip.report.html import MIB, fragment, shared_rows, shown_over, shown_size
from daskclip.report.progress import Mode, Show, State, show
from daskclip.report.reports import ClipReport, VerifyReport, as_document, as_page, as_text

__all__ = [
    "MIB", "ClipReport", "Mode", "Show", "State", "VerifyReport", "as_document", "as_page",
    "as_text", "fragment", "shared_rows", "show", "shown_over", "shown_size",
]  # fmt: skip
