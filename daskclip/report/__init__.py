"""What people and programs are told: reports as text, JSON and HTML, and progress.

Reports are data; nothing here opens a store, plans or computes.
"""

from daskclip.report.html import MIB, format_axes, format_size, fragment
from daskclip.report.progress import Mode, ProgressState, Show, progress_printer
from daskclip.report.reports import ClipReport, VerifyReport, as_document, as_page, as_text

__all__ = [
    "MIB", "ClipReport", "Mode", "ProgressState", "Show", "VerifyReport", "as_document", "as_page",
    "as_text", "format_axes", "format_size", "fragment", "progress_printer",
]  # fmt: skip
