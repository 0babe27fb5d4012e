"""Reports as text, JSON and HTML, and the progress of a run.

Reports are data; nothing here opens a store, plans or computes. The engine fills them: `ClipReport`
in attempt.py, `StatsReport` in stats.py, `VerifyReport` in verify.py. A new field has a default, so
that reports in the journals of earlier runs can be read.
"""

from daskclip.report.html import as_page, fragment
from daskclip.report.progress import Mode, ProgressState, Show, progress_printer
from daskclip.report.reports import ClipReport, StatsReport, VerifyReport
from daskclip.report.text import MIB, as_document, as_text, format_axes, format_size

__all__ = [
    "MIB", "ClipReport", "Mode", "ProgressState", "Show", "StatsReport", "VerifyReport",
    "as_document", "as_page", "as_text", "format_axes", "format_size", "fragment",
    "progress_printer",
]  # fmt: skip
