"""A run that is stored: begun, taken up again, recorded, and recognised when it is done."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from daskclip.engine.cluster import workers
from daskclip.errors import MemoryBudgetError, TargetExistsError
from daskclip.grid import ceil_div
from daskclip.plan import ClipPlan, GroupPlan
from daskclip.report import MIB, ClipReport, format_size
from daskclip.storage import Hierarchy, translating_storage_errors
from daskclip.target import (
    JOURNAL,
    DirectoryTransaction,
    Entry,
    Journal,
    ObjectStoreTransaction,
    Target,
    find_target,
    journal,
    matches_record,
)

Transaction = DirectoryTransaction | ObjectStoreTransaction

VERSION = 4
"""Of what a journal says; another one can neither be resumed nor verified."""
DISCARD = "discard it with: daskclip discard TARGET"


def run_identity(source: Hierarchy, target: Target, **parameters: Any) -> Entry:
    """What makes two runs the same one."""
    return {
        "version": VERSION,
        "parameters": {"source": str(source), "target": str(target)} | parameters,
        "source": source.fingerprint(changes=True),
    }


def find_finished(work: Transaction, run: Entry) -> ClipReport | None:
    """Report of the run that made what is at the target, if it is the same one."""
    path = work.record  # in an object store, asking for it takes a request
    old = journal.header(path)
    if old is None or any(old.get(k) != run[k] for k in ("version", "parameters")):
        return None
    # in place, what is there is the result and not the source any more
    parameters = run["parameters"]
    if parameters["source"] != parameters["target"] and old["source"] != run["source"]:
        return None
    *_, (last, _) = journal.entries(path)
    if matches_record(work.target.open, last):
        axes = last["report"]["axes"]
        return ClipReport(**last["report"] | {"axes": None if axes is None else tuple(axes)})
    return None


def find_unfinished(work: Transaction, source: Hierarchy, run: Entry, memory: int) -> Entry | None:
    """The unfinished run in ``work``, if there is one; refused if it is another one."""
    old = journal.header(work.folder / JOURNAL)
    if old is None:
        return None
    where = f"the unfinished run to {work.target}"
    if old.get("version") != VERSION:
        raise TargetExistsError(
            f"{where} has version {old.get('version')} and not {VERSION}; "
            f"finish it with the daskclip that began it, or {DISCARD}"
        )
    was, is_ = old["parameters"], run["parameters"]
    differences = [f"{k} {was[k]} and not {is_[k]}" for k in was if was[k] != is_[k]]
    if differences:
        raise TargetExistsError(f"{where} has {', '.join(differences)}; finish it, or {DISCARD}")
    if old["source"] != run["source"]:
        raise TargetExistsError(
            f"source {is_['source']} (chunk {run['source'].get('newest')}) changed since "
            f"{where} began; {DISCARD}"
        )
    *_, (last, _) = journal.entries(work.folder / JOURNAL)
    if not work.complete(source, old["run"], last):
        raise TargetExistsError(f"{where} has lost its files; {DISCARD}")
    return old | plan_to_json(replan(old, memory))


def replan(
    run: Entry, memory: int, of: str = "the unfinished run needs with", otherwise: str = DISCARD
) -> GroupPlan:
    """The plan that a run began with, on the workers and in the memory that there are now."""
    plan = plan_from_json(run)
    _, most, fewest = workers()
    threads = max(fewest, min(most, plan.threads))
    need = ceil_div(plan.projected_memory * max(threads, plan.threads), plan.threads)
    if need > memory:
        raise MemoryBudgetError(
            f"memory {format_size(memory)} holds less than the {format_size(need)} that {of} "
            f"{threads} threads; give memory='{ceil_div(need, MIB)}MiB', or {otherwise}"
        )
    now: Any = {"threads": threads, "memory": memory, "projected_memory": need}
    return replace(plan, plans={name: replace(p, **now) for name, p in plan.plans.items()})


def plan_to_json(plan: GroupPlan) -> Entry:
    """A plan as it is kept in a journal."""
    return {"plans": {name: asdict(one) for name, one in plan.plans.items()}}


def plan_from_json(run: Entry) -> GroupPlan:
    """The plan in a journal."""
    plans = {}
    for name, stored in run["plans"].items():
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        plans[name] = ClipPlan(**fields)
    return GroupPlan(plans, run["parameters"]["global_norm"])


def start_run(work: Transaction, source: Hierarchy, run: Entry, plan: GroupPlan) -> Entry:
    """A new run, of which nothing is done."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    run |= {"run": uuid4().hex, "began": began} | plan_to_json(plan)
    work.begin(source, run["run"])
    journal.begin(work.folder / JOURNAL, run)
    return run


def close_journal(entries: Journal, made: Entry, report: ClipReport) -> None:
    """End the journal."""
    if entries.replay() is None:
        entries.append({"report": asdict(report), "made": made})


def status(target: Any) -> dict[str, str]:
    """What there is at ``target`` and beside it, for people."""
    place = find_target(target)
    rows = {"target": f"{place} {'exists' if place.exists() else 'does not exist'}"}
    with translating_storage_errors(f"looking at {place}"), place.journals() as (made, unfinished):
        for name, path in (("made by", made), ("unfinished", unfinished)):
            run = journal.header(path)
            if run is not None:
                rows |= {name: f"run {run['run']}"} | {
                    k: str(v) for k, v in run["parameters"].items() if k != "target"
                }
        if unfinished.exists():
            windows = max(0, sum(1 for _ in journal.entries(unfinished)) - 1)
            running = "running" if place.busy() else "not running"
            rows["journal"] = f"{windows} windows done, {running}"
    return rows


def discard(target: Any) -> bool:
    """Remove an unfinished run; returns whether there was one."""
    place = find_target(target)
    with translating_storage_errors(f"discarding the run for {place}"):
        found = place.unfinished()
        if found:
            with place.locked() as work:
                work.clear()
    return found
