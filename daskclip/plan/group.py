"""What a run over several arrays will do: a plan for each, under one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, ClassVar

from daskclip.errors import MemoryBudgetError
from daskclip.plan.array import BLOCK, CALL, ClipPlan, grown, make_plan
from daskclip.report import format_size, fragment, shared_rows


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Plans of all arrays of a group, and the memory that the run will need."""

    plans: dict[str, ClipPlan]
    """By the path of the array in the group; those that are only copied have no passes."""
    global_norm: bool
    """Whether all arrays are one slice."""
    derived: ClassVar = ClipPlan.derived
    """Properties that JSON has beside the fields."""

    @property
    def clipped(self) -> dict[str, ClipPlan]:
        """Plans of the arrays that are clipped."""
        return {name: plan for name, plan in self.plans.items() if plan.passes}

    @property
    def kept(self) -> dict[int, int]:
        """Lengths of the axes that are not reduced, of an array that is no part of a group."""
        return self.plans[""].kept if "" in self.plans else {}

    @property
    def slices(self) -> int:
        """Number of slices."""
        return 1 if self.global_norm else sum(p.slices for p in self.clipped.values())

    @property
    def slabs(self) -> int:
        """Number of slabs."""
        return 1 if self.global_norm else sum(p.slabs for p in self.clipped.values())

    @property
    def blocks(self) -> int:
        """Number of blocks, those that are only copied too."""
        return sum(p.blocks for p in self.plans.values())

    @property
    def tasks(self) -> int:
        """Blocks to run, over all passes; combining norms takes some more."""
        return sum(p.tasks for p in self.plans.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that are clipped, decoded."""
        return sum(p.nbytes for p in self.clipped.values())

    @property
    def bytes_read(self) -> int:
        """Bytes that will be read, decoded."""
        return sum(p.bytes_read for p in self.plans.values())

    @property
    def passes(self) -> int:
        """How often the array that is read most often is read."""
        return max(p.passes for p in self.plans.values())

    @property
    def window(self) -> int:
        """Blocks of a window, at most."""
        return min(p.window for p in self.plans.values())

    @property
    def processes(self) -> int:
        """Processes that run blocks."""
        return self._first.processes

    @property
    def threads(self) -> int:
        """Threads of each of them."""
        return self._first.threads

    @property
    def memory(self) -> int:
        """Budget of each of them, in bytes above its imports."""
        return self._first.memory

    @property
    def projected_memory(self) -> int:
        """What each of them will need at most, in bytes."""
        return max(p.projected_memory for p in self.plans.values())

    def rows(self) -> dict[str, str]:
        """The figures for people."""
        copied = len(self.plans) - len(self.clipped)
        return {
            "arrays": f"{len(self.clipped):,}, {format_size(self.nbytes)}; {copied:,} more copied",
            "slices": f"{self.slices:,}",
            "blocks": f"{self.blocks:,}, {self.slabs:,} slabs",
        } | shared_rows(self)

    def _repr_html_(self) -> str:
        return fragment("daskclip plan", self.rows(), None)

    @property
    def _first(self) -> ClipPlan:
        return next(iter(self.clipped.values()))


def plan_group(
    clipped: Mapping[str, dict[str, Any]],
    copied: Mapping[str, dict[str, Any]],
    threads: int,
    global_norm: bool,
    **common: Any,
) -> GroupPlan:
    """Plans of all arrays, on as many threads as the one that needs most of each allows.

    ``clipped`` and ``copied`` hold arguments of `make_plan` by array.
    """

    def plan(name: str, threads: int) -> ClipPlan:
        return make_plan(**clipped[name], **common, threads=threads, shared=global_norm)

    plans, refused = {}, []
    for name in clipped:
        try:
            plans[name] = plan(name, threads)
        except MemoryBudgetError as error:
            refused.append((error.need, name, error))
    if refused:
        _, name, most = max(refused, key=itemgetter(0))
        raise MemoryBudgetError(f"array {name}: {most}" if name else str(most)) from most
    fewest = min(p.threads for p in plans.values())
    if fewest < threads:
        plans = {name: plan(name, fewest) for name in clipped}
    window = min(p.window for p in plans.values())
    like = replace(next(iter(plans.values())), window=window)
    return GroupPlan(
        plans | {name: _copied(like, **one) for name, one in copied.items()}, global_norm
    )


def _copied(like: ClipPlan, *, shape: Any, unit: Any, itemsize: int, **_: Any) -> ClipPlan:
    """Plan of an array that is not decoded: files are copied in pieces, objects a few at a time."""
    unit = tuple(max(1, min(u, n)) for u, n in zip(unit, shape, strict=True))
    size = min(BLOCK // itemsize, CALL * math.prod(unit))
    block = grown(unit, shape, range(len(shape)), size)
    return replace(
        like, shape=shape, axes=(), unit=unit, itemsize=itemsize, block=block, passes=0,
        projected_memory=0,
    )  # fmt: skip
