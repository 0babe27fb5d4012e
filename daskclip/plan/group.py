"""The plan of a run over several arrays: one for each, under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from daskclip.errors import MemoryBudgetError
from daskclip.plan.array import ClipPlan, grown, make_plan, shared_rows
from daskclip.plan.sizing import Layout, Machine, Sizing
from daskclip.report import format_size, fragment


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Plans of all arrays of a group, and the memory the run needs."""

    plans: dict[str, ClipPlan]
    """Plans by the path of the array in the group; one that is only copied has no passes."""
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
        """Lengths of the axes of an array that are not reduced; empty for a group."""
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
        """Number of blocks, with those that are only copied."""
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
        """Bytes to read, decoded, over all passes."""
        return sum(p.bytes_read for p in self.plans.values())

    @property
    def passes(self) -> int:
        """Times an array is read, at most."""
        return max(p.passes for p in self.plans.values())

    @property
    def window(self) -> int:
        """Blocks of a window, at most."""
        return min(p.window for p in self.plans.values())

    @property
    def processes(self) -> int:
        """Processes that run blocks."""
        return min(p.processes for p in self.plans.values())

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return min(p.threads for p in self.plans.values())

    @property
    def memory(self) -> int:
        """Budget of each process, in bytes above its imports."""
        return min(p.memory for p in self.plans.values())

    @property
    def projected_memory(self) -> int:
        """Peak memory of each process, in bytes above its imports."""
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


def plan_group(
    clipped: Mapping[str, Layout],
    copied: Mapping[str, Layout],
    machine: Machine,
    sizing: Sizing,
    *,
    global_norm: bool,
) -> GroupPlan:
    """Plan all arrays of a group, on as many threads as the array that needs most memory allows.

    Parameters
    ----------
    clipped, copied : mapping of str to Layout
        Arrays to clip and arrays to copy as they are, by their paths.
    machine : Machine
        What runs the blocks of all arrays.
    sizing : Sizing
        Sizes of blocks and windows.
    global_norm : bool
        Whether all arrays are one slice.

    Returns
    -------
    GroupPlan

    Raises
    ------
    MemoryBudgetError
        If an array does not fit; names the one that needs most.
    """
    plans = _plan_each(clipped, machine, sizing, global_norm)
    fewest = min(p.threads for p in plans.values())
    if fewest < machine.threads:
        plans = _plan_each(clipped, replace(machine, threads=fewest), sizing, global_norm)
    window = min(p.window for p in plans.values())
    like = replace(next(iter(plans.values())), window=window)
    copies = {name: _plan_copy(like, layout, sizing) for name, layout in copied.items()}
    return GroupPlan(plans | copies, global_norm)


def _plan_each(
    layouts: Mapping[str, Layout], machine: Machine, sizing: Sizing, global_norm: bool
) -> dict[str, ClipPlan]:
    plans, refused = {}, {}
    for name, layout in layouts.items():
        try:
            plans[name] = make_plan(layout, machine, sizing, is_shared=global_norm)
        except MemoryBudgetError as error:
            refused[name] = error
    if refused:
        # the remedy of the array that needs most works for all
        name, most = max(refused.items(), key=lambda item: item[1].need)
        raise MemoryBudgetError(f"array {name}: {most}" if name else str(most)) from most
    return plans


def _plan_copy(like: ClipPlan, layout: Layout, sizing: Sizing) -> ClipPlan:
    """Plan of an array that is not decoded: files are copied in pieces, objects a few at a time."""
    shape, unit = layout.shape, layout.first_block
    return replace(
        like,
        shape=shape,
        axes=(),
        unit=unit,
        itemsize=layout.itemsize,
        block=grown(unit, shape, range(len(shape)), layout.max_block(sizing)),
        passes=0,
        projected_memory=0,
    )
