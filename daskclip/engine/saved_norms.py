"""Norms that are kept for other runs: an array of them, and in it the sums they were made from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from daskclip.engine.run_record import VERSION, plan_to_json, replan
from daskclip.errors import (
    InvalidTypeError,
    InvalidValueError,
    SourceChangedError,
    SourceError,
    SourceNotFoundError,
    short_repr,
)
from daskclip.numerics import Partial, SliceCounts
from daskclip.storage import Hierarchy, StoredArray, durable
from daskclip.target import (
    JOURNAL,
    Arrays,
    DirectoryTarget,
    Entry,
    find_target,
    journal,
    refuse_existing,
)

if TYPE_CHECKING:
    from daskclip.plan import GroupPlan

SUMS = ".daskclip-sums"
"""Folder of the journal of the first pass; zarr takes no notice of it."""
ALIKE = ("axes", "ord", "nonfinite", "missing")
AGAIN = "save them again with: daskclip stats SOURCE --save-norms NORMS"


@dataclass(frozen=True)
class SavedNorms:
    """Norms that `saving` has kept."""

    path: Path
    """Folder of their array."""
    total: SliceCounts
    """Of all slices."""
    source: Entry
    """Fingerprint of what they were taken of."""

    def require_of(self, source: Hierarchy) -> None:
        """Require the source to be what it was when they were saved."""
        if self.source != source.fingerprint(changes=True):
            raise SourceChangedError(
                f"source {source} is not what it was when norms {self.path} were saved; {AGAIN}"
            )

    def entries(self) -> Iterator[Entry]:
        """Those of the first pass, each with the folder of its sums."""
        folder = self.path / SUMS
        found = (entry for entry, _ in journal.entries(folder / JOURNAL))
        return (entry | {"folder": str(folder)} for entry in found if "sums" in entry)


def saved_sums(entry: Entry) -> list[Partial] | None:
    """Sums that an entry of `SavedNorms` names; kept after the last window of a slab only."""
    path = Path(entry["folder"], entry["sums"])
    try:
        return partials_of(journal.load(path)) if path.exists() else None
    except Exception as error:  # of a damaged file, numpy and zipfile raise anything
        raise SourceError(f"norms {path.parent.parent} are damaged; {AGAIN}") from error


def arrays_of(sums: Sequence[Partial]) -> Arrays:
    """Arrays that a journal keeps for sums."""
    arrays: Arrays = {}
    for i, p in enumerate(sums):
        arrays |= {f"limbs{i}": p.limbs, f"flags{i}": p.flags}
        arrays |= {f"rest{i}": np.array([p.low, p.terms]), f"ord{i}": np.array(p.ord)}
    return arrays


def partials_of(arrays: Arrays) -> list[Partial]:
    """Sums in the arrays that a journal keeps."""
    sums = []
    for i in range(len(arrays) // 4):
        low, terms = arrays[f"rest{i}"].tolist()
        ord = arrays[f"ord{i}"].item()
        sums.append(Partial(arrays[f"limbs{i}"], low, arrays[f"flags{i}"], terms, ord))
    return sums


@contextmanager
def saving(path: Any, source: Hierarchy, run: Entry, plan: GroupPlan) -> Iterator[Hierarchy | None]:
    """A place for the norms of a source, which appears complete or not at all."""
    if path is None:
        yield None
        return
    if source.is_group:
        raise InvalidValueError(
            f"norms are saved of one array, and source {source} is a group; give an array in it"
        )
    place = _folder(path)
    place.check(source, overwrite=False, in_place=False)
    with place.locked() as work:
        refuse_existing(place)
        folder = work.folder / uuid4().hex
        _make(folder, source, run["parameters"], plan)
        (folder / SUMS).mkdir()
        parameters = run["parameters"] | {"source": str(source)}
        header = run | {"version": VERSION, "parameters": parameters}
        journal.begin(folder / SUMS / JOURNAL, header | plan_to_json(plan))
        yield Hierarchy.open(folder)
        durable.sync_filesystem(folder)
        refuse_existing(place)
        os.rename(folder, place.path)
        durable.sync_filesystem(place.path.parent)


def open_norms(
    path: Any, source: Hierarchy, parameters: Entry, memory: int
) -> tuple[SavedNorms, GroupPlan]:
    """Norms that were saved of a source, and the plan they were saved by, which reads it once."""
    if source.is_group:
        raise InvalidValueError(
            f"norms are saved of one array, and source {source} is a group; leave them out"
        )
    if parameters["limits"] is not None or parameters["clip_norm"] == "nan":
        given = "limits" if parameters["limits"] is not None else "clip_norm nan"
        raise InvalidValueError(f"norms do not go with {given}; leave out one of them")
    place = _folder(path)
    if not place.exists():
        raise SourceNotFoundError(f"norms {place} do not exist; check the path, or {AGAIN}")
    at = place.path / SUMS / JOURNAL
    run = journal.header(at)
    if run is None or run["version"] != VERSION:
        raise SourceError(f"norms {place} were not saved by this daskclip; {AGAIN}")
    was = run["parameters"]
    different = [f"{k} {was[k]} and not {parameters[k]}" for k in ALIKE if was[k] != parameters[k]]
    if different:
        raise InvalidValueError(f"norms {place} have {', '.join(different)}; {AGAIN}")
    *_, (last, _) = journal.entries(at)
    if "total" not in last:
        raise SourceError(f"norms {place} are damaged; {AGAIN}")
    plan = replan(run, memory, f"norms {place} need with", AGAIN)
    plans = {name: replace(one, passes=1) for name, one in plan.plans.items()}
    return SavedNorms(place.path, SliceCounts.from_json(last["total"]), run["source"]), replace(
        plan, plans=plans
    )


def _folder(path: Any) -> DirectoryTarget:
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"norms {short_repr(path)} is not a path; give the path of a folder")
    place = find_target(path)
    if not isinstance(place, DirectoryTarget):
        raise InvalidValueError(
            f"norms {short_repr(path)} are not on a local file system; give a path"
        )
    return place


def _make(folder: Path, source: Hierarchy, parameters: Entry, plan: GroupPlan) -> None:
    """An array without chunks, of which each block of the source writes whole ones."""
    array, one = source.arrays[""], plan.plans[""]
    names = array.dimension_names
    StoredArray.create(
        folder,
        shape=tuple(one.kept.values()),
        chunks=tuple(max(1, one.block[a]) for a in one.kept),
        names=None if names is None else [names[a] for a in one.kept],
        attributes={"source": str(source), **{k: parameters[k] for k in ALIKE}},
    )
