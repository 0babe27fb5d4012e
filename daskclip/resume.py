"""A run on disk: begun, taken up again, recorded, and recognised when it is done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from daskclip import files, journal, storage
from daskclip.blocks import ceil_div
from daskclip.errors import MemoryBudgetError, TargetExistsError, failing
from daskclip.journal import Entry, Journal
from daskclip.plan import MIB, ClipPlan
from daskclip.publish import (
    JOURNAL,
    RECORD,
    busy,
    clear,
    local_target,
    locked,
    refuse_strangers,
    require_exchange,
    work_of,
)
from daskclip.report import ClipReport
from daskclip.workers import workers

VERSION = 2
"""Of what a journal says; another one can neither be resumed nor verified."""
DISCARD = "discard it with: daskclip discard TARGET"


def describe(array: Any, path: Path, **parameters: Any) -> Entry:
    """What makes two runs the same one."""
    places = {"source": storage.location(array), "target": str(path)}
    return {
        "version": VERSION,
        "parameters": places | parameters,
        "source": storage.fingerprint(array, changes=True),
    }


def finished(path: Path, run: Entry) -> ClipReport | None:
    """Report of the run that made what is at ``path``, if it is the same one."""
    old = journal.header(path / RECORD)
    if old is None or any(old.get(k) != run[k] for k in ("version", "parameters")):
        return None
    # in place, what is there is the result and not the source any more
    if run["parameters"]["source"] != str(path) and old["source"] != run["source"]:
        return None
    *_, (last, _) = journal.entries(path / RECORD)
    if _is_what_was_made(path, last):
        return ClipReport(**last["report"] | {"axes": tuple(last["report"]["axes"])})
    return None


def _is_what_was_made(folder: Path, last: Entry) -> bool:
    """Whether a folder holds what the last entry of its journal says."""
    with suppress(Exception):  # zarr raises anything for what is no array any more
        return bool(last["made"] == storage.fingerprint(storage.open_made(folder), changes=False))
    return False


def resumed(work: Path, run: Entry, memory: int) -> Entry | None:
    """The unfinished run in ``work``, if there is one; refused if it is another one."""
    old = journal.header(work / JOURNAL)
    if old is None:
        return None
    if old.get("version") != VERSION:
        raise TargetExistsError(
            f"the unfinished run in {work} has version {old.get('version')} and not {VERSION}; "
            f"finish it with the daskclip that began it, or {DISCARD}"
        )
    was, is_ = old["parameters"], run["parameters"]
    differences = [f"{k} {was[k]} and not {is_[k]}" for k in was if was[k] != is_[k]]
    if differences:
        raise TargetExistsError(
            f"the unfinished run in {work} has {', '.join(differences)}; finish it, or {DISCARD}"
        )
    if old["source"] != run["source"]:
        raise TargetExistsError(
            f"source {is_['source']} (chunk {run['source'].get('newest')}) changed since the "
            f"unfinished run in {work} began; {DISCARD}"
        )
    if not _complete(work, work / old["run"]):
        raise TargetExistsError(f"the unfinished run in {work} has lost its files; {DISCARD}")
    return old | {"plan": asdict(planned(old, memory))}


def _complete(work: Path, staged: Path) -> bool:
    """Whether what was staged is there, and not what it was exchanged for."""
    if not staged.is_dir():
        return False
    *_, (last, _) = journal.entries(work / JOURNAL)
    return "made" not in last or _is_what_was_made(staged, last)


def planned(run: Entry, memory: int) -> ClipPlan:
    """The plan that a run began with, on the workers and in the memory that there are now."""
    plan = plan_of(run)
    _, most, fewest = workers()
    threads = max(fewest, min(most, plan.threads))
    need = ceil_div(plan.projected_memory * max(threads, plan.threads), plan.threads)
    if need > memory:
        raise MemoryBudgetError(
            f"memory {memory / MIB:.1f} MiB holds less than the {need / MIB:.1f} MiB that the "
            f"unfinished run needs with {threads} threads; give memory='{ceil_div(need, MIB)}MiB', "
            f"or {DISCARD}"
        )
    return replace(plan, threads=threads, memory=memory, projected_memory=need)


def plan_of(run: Entry) -> ClipPlan:
    """The plan in a journal."""
    stored: dict[str, Any] = run["plan"]
    fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return ClipPlan(**fields)


def begun(work: Path, array: Any, run: Entry, plan: ClipPlan, replacing: Path | None) -> Entry:
    """A new run, with an array without chunks in staging."""
    clear(work)  # of a run that was stopped before it had a journal
    if replacing is not None:
        require_exchange(work)
        if str(replacing) == run["parameters"]["source"]:
            refuse_strangers(replacing, storage.METADATA)
    run |= {"run": uuid4().hex, "plan": asdict(plan)}
    storage.create_like(array, work / run["run"])
    files.sync(work)
    journal.begin(work / JOURNAL, run)
    return run


def record(entries: Journal, staged: Path, report: ClipReport) -> None:
    """End the journal, over exactly the files that are to be published."""
    if entries.replay() is not None:
        return
    made = storage.open_made(staged)
    for key, _ in files.scan(staged, storage.depth(made)):
        if not files.CHUNK.fullmatch(key) and key not in storage.METADATA:
            (staged / key).unlink()
    made_now = storage.fingerprint(made, changes=False)
    entries.append({"report": asdict(report), "made": made_now})


def status(target: Any) -> dict[str, str]:
    """What there is at ``target`` and beside it, for people."""
    path = local_target(target)
    work = work_of(path)
    rows = {"target": f"{path} {'exists' if path.exists() else 'does not exist'}"}
    for name, place in (("made by", path / RECORD), ("unfinished", work / JOURNAL)):
        run = journal.header(place)
        if run is not None:
            rows |= {name: f"run {run['run']}"} | {
                k: str(v) for k, v in run["parameters"].items() if k != "target"
            }
    if (work / JOURNAL).exists():
        windows = max(0, sum(1 for _ in journal.entries(work / JOURNAL)) - 1)
        rows["journal"] = f"{windows} windows done, {'running' if busy(work) else 'not running'}"
    return rows


def discard(target: Any) -> bool:
    """Remove an unfinished run; returns whether there was one."""
    path = local_target(target)
    found = work_of(path).exists()
    if found:
        with failing(f"discarding the run for {path}"), locked(path) as work:
            clear(work)
    return found
