"""Norms that are saved for other runs: an array, and in it the sums they were made from."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
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
from daskclip.plan import ClipPlan, GroupPlan
from daskclip.storage import Hierarchy, StoredArray, durable
from daskclip.target import ArrayFiles, DirectoryTarget, find_target, journal, refuse_existing
from daskclip.worker import Sums, kept_sums

SUMS = ".daskclip-sums"
"""Folder of the journal of the first pass; zarr ignores it."""
ALIKE = ("axes", "ord", "nonfinite", "missing")


def _how_to_save(source: object, path: object) -> str:
    place = str(source)
    # a store that is an object of this process has no name that a shell could give
    if not os.path.isabs(place) and ("://" not in place or place.startswith("memory:")):
        return f"with stats_zarr and save_norms={str(path)!r}"
    quoted = f"{shlex.quote(place)} --save-norms {shlex.quote(str(path))}"
    return f"with: daskclip stats {quoted}"


def _remedy(source: object, path: object) -> str:
    """Remedy for saved norms that cannot be used; nothing may exist where norms are saved."""
    return f"save them again {_how_to_save(source, path)} (after removing the old ones)"


def _journal_in(folder: Path) -> Path:
    """Path of the journal of the pass that took the norms in a folder."""
    return folder / SUMS / journal.JOURNAL


@dataclass(frozen=True)
class SavedNorms:
    """Norms that `saving` has written."""

    path: Path
    """Folder of their array."""
    total: SliceCounts
    """Counts over all slices."""
    source: journal.Json
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
    def _slabs(self) -> dict[str, list[journal.BlocksRecord]]:
        """Records of the first pass of each slab."""
        found: dict[str, list[journal.BlocksRecord]] = {}
        for record in journal.records(_journal_in(self.path)):
            if isinstance(record, journal.BlocksRecord) and record.slab is not None:
                found.setdefault(record.slab, []).append(record)
        return found

    def sums(self, slab: str, state: int) -> tuple[Sums, dict[int, int]] | None:
        """Sums of a slab and the digests of its blocks; None if nothing of it is stored."""
        records = self._slabs.get(slab)
        if records is None:
            return None
        digests = {n: d for record in records for n, d in (record.source or {}).items()}
        try:
            kept = kept_sums(ArrayFiles(self.path / SUMS), records[-1].sums or "", state)
        except Exception as error:  # numpy and zipfile raise errors of any kind for a damaged file
            raise SourceError(
                f"norms {self.path} are damaged; {_remedy(self.place, self.path)}"
            ) from error
        return kept, digests


@contextmanager
def saving(
    path: object, source: Hierarchy, run: journal.RunRecord, plan: GroupPlan
) -> Iterator[tuple[journal.Journal | None, Hierarchy | None]]:
    """Open a journal for taking norms, and make an array for them if a path is given.

    The array appears complete or not at all.
    """
    if path is None:
        yield None, None
        return
    if source.is_group:
        raise InvalidValueError(
            f"norms are saved of one array, and source {source} is a group; give an array in it"
        )
    target = _directory(path)
    refuse_existing(target)
    target.check(source, overwrite=False, in_place=False)
    with target.locked() as transaction:
        refuse_existing(target)
        transaction.require_place()
        # with a new name, since a call that was killed may have left another one
        folder = transaction.folder / uuid4().hex
        _create(folder, source, run.parameters, plan.plans[""])
        (folder / SUMS).mkdir()
        parameters = run.parameters | {"source": str(source)}
        record = replace(run, parameters=parameters, plans=plan_to_json(plan))
        journal.begin(_journal_in(folder), record)
        with journal.Journal(_journal_in(folder)) as entries:
            yield entries, Hierarchy.open(folder)
        # the sums are inside the array, so that one rename publishes both
        durable.sync_filesystem(folder)
        refuse_existing(target)
        # between the check and this, only an empty folder could be replaced
        os.rename(folder, target.path)
        durable.sync_filesystem(target.path.parent)


def open_norms(
    path: object, source: Hierarchy, parameters: journal.Json, memory: int
) -> tuple[SavedNorms, GroupPlan]:
    """Open the saved norms of a source, with the plan they were saved by, which reads it once."""
    if source.is_group:
        raise InvalidValueError(
            f"norms are saved of one array, and source {source} is a group; leave them out"
        )
    if parameters["limits"] is not None:
        raise InvalidValueError("norms do not go with limits; leave out one of them")
    target = _directory(path)
    if not target.exists():
        raise SourceNotFoundError(
            f"norms {target} do not exist; check the path, or save them "
            f"{_how_to_save(source, target)}"
        )
    record = _journal_in(target.path)
    # what holds no norms, or is the source, must not be removed
    if not record.is_file() or target.path == source.folder:
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
    plans = {name: replace(one, passes=1) for name, one in plan.plans.items()}
    saved = SavedNorms(target.path, SliceCounts.from_json(last.total), run.source, str(source))
    return saved, replace(plan, plans=plans)


def _directory(path: object) -> DirectoryTarget:
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError(f"norms {short_repr(path)} is not a path; give the path of a folder")
    target = find_target(path)
    # norms appear by a rename, which object stores do not have
    if not isinstance(target, DirectoryTarget):
        raise InvalidValueError(
            f"norms {short_repr(path)} are not on a local file system; give a path"
        )
    return target


def _create(folder: Path, source: Hierarchy, parameters: journal.Json, plan: ClipPlan) -> None:
    names = source.dimension_names("")
    kept_names = None if names is None else [names[a] for a in plan.kept]
    # whole chunks belong to one block of the source, so that each has one writer
    chunks = tuple(max(1, plan.block[a]) for a in plan.kept)
    attributes = {"source": str(source)} | {k: parameters[k] for k in ALIKE}
    shape = tuple(plan.kept.values())
    StoredArray.create(folder, shape=shape, chunks=chunks, names=kept_names, attributes=attributes)
