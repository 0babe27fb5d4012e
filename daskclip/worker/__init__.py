"""One block in, one block out: what a process does that runs blocks.

Every function can run twice and does the same again. Nothing here knows which block comes next.
"""

from daskclip.worker import tasks
from daskclip.worker.context import ArrayTask, drain

__all__ = ["ArrayTask", "drain", "tasks"]
