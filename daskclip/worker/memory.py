"""Memory of the processes that run blocks."""

from pathlib import Path

Memory = tuple[int, int] | None
"""Resident bytes of a process, now and at the highest; None where the system does not say."""


def own_memory(reset: bool) -> Memory:
    """Memory of this process; with ``reset``, the highest is counted from now."""
    try:
        if reset:
            # the highest is that of the whole life of the process, or since this
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def memory_growth(before: dict[str, Memory], after: dict[str, Memory]) -> int | None:
    """Bytes by which the process grew that grew most, of those that were there before."""
    pairs = [(before[k], now) for k, now in after.items() if k in before]
    known = [now[1] - then[0] for then, now in pairs if then and now]
    return max(known) if known and len(known) == len(pairs) else None
