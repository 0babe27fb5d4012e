"""Reports as text, JSON and HTML, and the progress of a run.

Reports are data; nothing here opens a store, plans or computes. The engine fills them:
`ClipReport` in attempt.py, `StatsReport` in stats.py, `VerifyReport` in verify.py. A new field of
`ClipReport` has a default, so that "up to date" can still read the reports of earlier runs; or
`VERSION` is raised, which the next paragraph explains.

A figure that is counted over slices is a field of `SliceCounts` (numerics/histogram.py:
`count_slices` and `add`), which `_report` in engine/attempt.py passes on. Slices that are not
stored are counted by `Passes.count_empty` in engine/passes.py. Journals store the fields by
position, so raise `VERSION` in target/journal.py with them.
"""

from daskclip.report import output
from daskclip.report.html import as_page, fragment
from daskclip.report.progress import Mode, Progress, Show, progress_printer
from daskclip.report.reports import ClipReport, StatsReport, VerifyReport
from daskclip.report.text import MIB, as_document, as_text, format_axes, format_size

__all__ = [
    "MIB", "ClipReport", "Mode", "Progress", "Show", "StatsReport", "VerifyReport",
    "as_document", "as_page", "as_text", "format_axes", "format_size", "fragment", "output",
    "progress_printer",
]  # fmt: skip
