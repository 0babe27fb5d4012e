"""Runs that are stored: started, found again, reported and discarded."""

from __future__ import annotations

import shlex
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
from daskclip.target import Json, RunRecord, Transaction, find_target, journal, matches_record


def _discarding(target: object) -> str:
    return f"discard it with: daskclip discard {shlex.quote(str(target))}"


def find_finished(transaction: Transaction, run: RunRecord, *, in_place: bool) -> ClipReport | None:
    """Report of the run that made the target, if it is the same run."""
    path = transaction.record
    old = journal.header(path)
    if old is None or (old.version, old.parameters) != (run.version, run.parameters):
        return None
    # after a run in place, the source that was read is gone and the target is in its place
    if not in_place and old.source != run.source:
        return None
    last = journal.final(path)
    if last is None or last.report is None or not matches_record(transaction.target.open, last):
        return None
    axes = last.report["axes"]
    return ClipReport(**last.report | {"axes": tuple(axes) if isinstance(axes, list) else axes})


def find_unfinished(
    transaction: Transaction, source: Hierarchy, run: RunRecord
) -> RunRecord | None:
    """Record of the unfinished run to a target, if there is one; refused if it is another run."""
    old = journal.header(transaction.journal)
    if old is None:
        return None
    which, remedy = f"the unfinished run to {transaction.target}", _discarding(transaction.target)
    if not old.is_readable:
        raise TargetExistsError(
            f"{which} has version {old.version} and not {run.version}; "
            f"finish it with the daskclip that began it, or {remedy}"
        )
    was, now = old.parameters, run.parameters
    differences = [f"{k} {was[k]} and not {now[k]}" for k in was if was[k] != now[k]]
    if differences:
        raise TargetExistsError(f"{which} has {', '.join(differences)}; finish it, or {remedy}")
    # blocks of another source must not be mixed with those that are done
    if old.source != run.source:
        chunk = f" (chunk {run.source['newest']})" if run.source.get("newest") else ""
        raise TargetExistsError(f"source {source}{chunk} changed since {which} began; {remedy}")
    if not transaction.is_complete(source, old.id, journal.final(transaction.journal)):
        raise TargetExistsError(f"{which} has lost its files; {remedy}")
    return old


def stage_run(transaction: Transaction, source: Hierarchy, run: RunRecord) -> RunRecord:
    """Make staging of a new run; refuses what cannot be published later."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    run = replace(run, id=uuid4().hex, began=began)
    transaction.begin(source, run.id)
    return run


def start_journal(transaction: Transaction, run: RunRecord, plan: GroupPlan) -> RunRecord:
    """Make the journal of a run that is staged: one without staging is refused as damaged."""
    run = replace(run, plans=plan_to_json(plan))
    journal.begin(transaction.journal, run)
    return run


def plan_to_json(plan: GroupPlan) -> dict[str, Json]:
    """Fields of the plan of each array."""
    return {name: asdict(one) for name, one in plan.plans.items()}


def plan_from_json(run: RunRecord) -> GroupPlan:
    """The plan that a run began with."""
    plans = {}
    for name, stored in (run.plans or {}).items():
        # JSON has lists only; fields of a plan are tuples
        fields: Json = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        plans[name] = ClipPlan(**fields)
    return GroupPlan(plans, run.parameters["global_norm"])


def replan(
    run: RunRecord,
    memory: int | None = None,
    of: str = "the unfinished run needs with",
    otherwise: str = "",
) -> GroupPlan:
    """The plan that a run began with, for the workers of today and another ``memory``, if given."""
    plan, given = plan_from_json(run), memory is not None
    memory = plan.memory if memory is None else memory
    _, most, fewest = workers()
    # blocks stay as they are, so that memory grows with the threads
    fit = max(plan.threads, memory * plan.threads // max(1, plan.projected_memory))
    threads = max(fewest, min(most, fit))
    need = ceil_div(plan.projected_memory * max(threads, plan.threads), plan.threads)
    if need > memory:
        otherwise = otherwise or _discarding(run.parameters["target"])
        remedy = f"give memory='{ceil_div(need, MIB)}MiB', or {otherwise}"
        raise MemoryBudgetError(
            f"memory {format_size(memory)} holds less than the {format_size(need)} that {of} "
            f"{threads} threads; {remedy if given else 'use workers with fewer threads'}",
            need,
        )
    now: Any = {"threads": threads, "memory": memory, "projected_memory": need}
    now["window"] = max(threads, plan.window * threads // plan.threads)
    return replace(plan, plans={name: replace(p, **now) for name, p in plan.plans.items()})


def status(target: object) -> dict[str, str]:
    """Describe a target and its unfinished run, a row each."""
    found = find_target(target)
    rows = {"target": f"{found} {'exists' if found.exists() else 'does not exist'}"}
    with translating_storage_errors(f"looking at {found}"), found.journals() as (made, unfinished):
        for name, path in (("made by", made), ("unfinished", unfinished)):
            run = journal.header(path)
            if run is not None:
                rows |= {name: f"run {run.id}"}
                rows |= {k: str(v) for k, v in run.parameters.items() if k != "target"}
        # a run may be writing: a line that is not complete yet does not count
        if unfinished.exists():
            records = max(0, sum(1 for _ in journal.entries(unfinished)) - 1)
            running = "running" if found.busy() else "not running"
            rows["journal"] = f"{records} records, {running}"
    return rows


def discard(target: object) -> bool:
    """Remove an unfinished run; returns whether there was one."""
    found = find_target(target)
    with translating_storage_errors(f"discarding the run for {found}"):
        if not found.unfinished():
            return False
        with found.locked() as transaction:
            transaction.clear()
    return True
