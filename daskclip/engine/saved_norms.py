"""Norms that are saved for other runs, and in them the sums they were made from.

They are an array, or a group with an array for each that has norms of its own. Folders appear by a
rename; in an object store, metadata is stored last.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from daskclip.engine.run_record import plan_to_json, replan
from daskclip.errors import (
    InvalidTypeError,
    InvalidValueError,
    SourceChangedError,
    SourceError,
    SourceNotFoundError,
    short_repr,
)
from daskclip.numerics import SliceCounts
from daskclip.plan import GroupPlan
from daskclip.storage import Hierarchy, ObjectPrefix, StoredArray, parse_location
from daskclip.target import (
    ArrayFiles,
    BlocksRecord,
    DirectoryTarget,
    Journal,
    Json,
    RunRecord,
    Target,
    find_target,
    journal,
    refuse_existing,
)
from daskclip.worker import Sums, kept_sums

SUMS = ".daskclip-sums"
"""Folder of the journal of the first pass; zarr ignores it."""
ALIKE = ("axes", "dim", "ord", "nonfinite", "missing", "include", "exclude", "global_norm")
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _how_to_save(source: object, path: object) -> str:
    place = str(source)
    # a store that is an object of this process has no name that a shell could give
    if not os.path.isabs(place) and ("://" not in place or place.startswith("memory:")):
        return f"with stats_zarr and save_norms={str(path)!r}"
    quoted = f"{shlex.quote(place)} --save-norms {shlex.quote(str(path))}"
    return f"with: daskclip stats {quoted}"


def _remedy(source: object, path: object) -> str:
    """Remedy for saved norms that cannot be used; nothing may exist where norms are saved."""
    command = _how_to_save(source, path)
    return f"save them again {command} (and the options of this run, after removing the old ones)"


@dataclass(frozen=True)
class SavedNorms:
    """Norms that `saving` has written."""

    path: Target
    """Place of the norms."""
    journal: Path | bytes
    """Journal of the pass that took them."""
    arrays: ArrayFiles
    """Their sums."""
    total: SliceCounts
    """Counts over all slices."""
    source: Json
    """Fingerprint of the source."""
    place: str
    """Location of the source."""

    def require_of(self, source: Hierarchy) -> None:
        """Require a source to be what it was when the norms were saved."""
        if self.source != source.fingerprint(changes=True):
            raise SourceChangedError(
                f"source {source} is not what it was when norms {self.path} were saved; "
                f"{_remedy(source, self.path)}"
            )

    @cached_property
    def _slabs(self) -> dict[str, list[BlocksRecord]]:
        """Records of the first pass of each slab."""
        found: dict[str, list[BlocksRecord]] = {}
        for record in journal.records(self.journal):
            if isinstance(record, BlocksRecord) and record.slab is not None:
                found.setdefault(record.slab, []).append(record)
        return found

    def sums(self, slab: str, state: int) -> tuple[Sums, dict[int, int]] | None:
        """Sums of a slab and the digests of its blocks; None if nothing of it is stored."""
        found = self._slabs.get(slab)
        if found is None:
            return None
        digests = {n: d for record in found for n, d in (record.source or {}).items()}
        try:
            kept = kept_sums(self.arrays, found[-1].sums or "", state)
        except Exception as error:  # numpy and zipfile raise errors of any kind for a damaged file
            raise SourceError(
                f"norms {self.path} are damaged; {_remedy(self.place, self.path)}"
            ) from error
        return kept, digests


@contextmanager
def saving(
    path: object, source: Hierarchy, run: RunRecord, plan: GroupPlan, options: Json | None
) -> Iterator[tuple[Journal | None, dict[str, StoredArray]]]:
    """Open a journal for taking norms, and make arrays for them if a path is given.

    The arrays, by the names of those that they are the norms of, appear complete or not at all.
    """
    if path is None:
        yield None, {}
        return
    target = _find(path, options)
    refuse_existing(target)
    target.check(source, overwrite=False, in_place=False)
    with target.locked() as transaction:
        refuse_existing(target)
        # with a new name, since a call that was killed may have left another one
        folder = transaction.folder / uuid4().hex
        _create(folder, source, run.parameters, plan)
        made = Hierarchy.open(folder)
        opened, sums = transaction.open_new(made), _sums_in(target, folder, made.record_array)
        record = folder / made.record_array / SUMS / journal.JOURNAL
        record.parent.mkdir()
        parameters = run.parameters | {"source": str(source)}
        journal.begin(record, replace(run, parameters=parameters, plans=plan_to_json(plan)))
        names = {name: "" if plan.global_norm else name for name in plan.clipped}
        with Journal(record, arrays=sums) as entries:
            yield entries, {name: opened.arrays[own] for name, own in names.items()}
        # inside the array, so that both appear together
        if isinstance(sums.place, ObjectPrefix):
            sums.place.put(f"{sums.below}/{journal.JOURNAL}", record.read_bytes())
        transaction.publish_new(made)


def _sums_in(target: Target, folder: Path, array: str) -> ArrayFiles:
    """Sums of norms, in an array of these: files of a folder, or objects of a store."""
    # not in a group: zarr warns of what it does not know there
    if isinstance(target, DirectoryTarget):
        return ArrayFiles(folder / array / SUMS)
    return ArrayFiles(target, f"{array}/{SUMS}".lstrip("/"))


def open_norms(
    path: object, source: Hierarchy, parameters: Json, memory: int, options: Json | None
) -> tuple[SavedNorms, GroupPlan]:
    """Open the saved norms of a source, with the plan they were saved by, which reads it once."""
    if parameters["limits"] is not None:
        raise InvalidValueError("norms do not go with limits; leave out one of them")
    target = _find(path, options)
    if not target.exists():
        raise SourceNotFoundError(
            f"norms {target} do not exist; check the path, or save them "
            f"{_how_to_save(source, target)} (and the options of this run)"
        )
    record, sums = _open_record(target)
    # what holds no norms, or is the source, must not be removed
    if record is None or str(target) == str(source):
        raise SourceError(f"{target} holds no norms of source {source}; check the path")
    remedy = _remedy(source, target)
    run = journal.header(record)
    if run is None or not run.is_readable:
        raise SourceError(f"norms {target} were not saved by this daskclip; {remedy}")
    was = run.parameters
    different = [f"{k} {was[k]} and not {parameters[k]}" for k in ALIKE if was[k] != parameters[k]]
    if different:
        raise InvalidValueError(f"norms {target} have {', '.join(different)}; {remedy}")
    last = journal.final(record)
    if last is None or last.total is None:
        raise SourceError(f"norms {target} are damaged; {remedy}")
    plan = replan(run, memory, f"norms {target} need with", remedy)
    # the saved sums take the place of the first pass
    plans = {name: replace(one, passes=min(1, one.passes)) for name, one in plan.plans.items()}
    total = SliceCounts.from_json(last.total)
    saved = SavedNorms(target, record, sums, total, run.source, str(source))
    return saved, replace(plan, plans=plans)


def _find(path: object, options: Json | None) -> Target:
    if not isinstance(path, str | os.PathLike) and parse_location(path, options) is None:
        raise InvalidTypeError(
            f"norms {short_repr(path)} is not a path; give a path, a URL or a zarr store"
        )
    return find_target(path, options)


def _open_record(target: Target) -> tuple[Path | bytes | None, ArrayFiles]:
    """Journal of the pass that took norms, if there are any, and their sums."""
    array = ""
    # anything may be there: a file, or a folder with broken metadata
    with suppress(OSError, ValueError):
        array = target.open().record_array
    sums = _sums_in(target, Path(str(target)), array)
    if isinstance(sums.place, Path):
        path = sums.place / journal.JOURNAL
        return path if path.is_file() else None, sums
    (data,) = sums.place.get(f"{sums.below}/{journal.JOURNAL}")
    return None if data is None else data.tobytes(), sums


def _create(folder: Path, source: Hierarchy, parameters: Json, plan: GroupPlan) -> None:
    """Make the metadata of norms in a folder."""
    attributes = {"source": str(source)} | {k: parameters[k] for k in ALIKE}
    # of arrays that have norms in common, one is like all
    some = [*plan.clipped.items()][: 1 if plan.global_norm else None]
    for name, one in some:
        place = "" if plan.global_norm else name
        # the groups that it is in
        for group in Path(place).parents if place else ():
            (folder / group).mkdir(parents=True, exist_ok=True)
            (folder / group / "zarr.json").write_text(json.dumps(GROUP))
        names = source.dimension_names(name)
        # whole chunks belong to one block of the source, so that each has one writer
        StoredArray.create(
            folder / place,
            shape=tuple(one.kept.values()),
            chunks=tuple(max(1, one.block[a]) for a in one.kept),
            names=None if names is None else [names[a] for a in one.kept],
            attributes=attributes,
        )
