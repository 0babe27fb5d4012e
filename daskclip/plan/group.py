"""Choose blocks of all arrays of a group."""

from collections.abc import Mapping
from dataclasses import replace

from daskclip.plan.choose import grown, make_plan, plan_each
from daskclip.plan.joint import plan_joint
from daskclip.plan.plans import ClipPlan, GroupPlan
from daskclip.plan.sizing import Layout, Machine, Sizing


def plan_group(
    clipped: Mapping[str, Layout],
    copied: Mapping[str, Layout],
    machine: Machine,
    global_norm: bool,
) -> GroupPlan:
    """Plan all arrays of a group, on as many threads as the array that needs most memory allows.

    Parameters
    ----------
    clipped, copied : mapping of str to Layout
        Arrays to clip and arrays to copy as they are, by their paths.
    machine : Machine
        Processes, threads and memory for the blocks of all arrays.
    global_norm : bool
        Whether the arrays have their norms in common.

    Returns
    -------
    GroupPlan

    Raises
    ------
    MemoryBudgetError
        If an array does not fit; names the one that needs most.
    """
    plans = plan_joint(clipped, machine) if global_norm else plan_each(clipped, machine, make_plan)
    window = min(p.window for p in plans.values())
    like = replace(next(iter(plans.values())), window=window)
    copies = {name: _plan_copy(like, layout, machine.sizing) for name, layout in copied.items()}
    return GroupPlan(plans | copies, global_norm)


def _plan_copy(like: ClipPlan, layout: Layout, sizing: Sizing) -> ClipPlan:
    """Plan of an array that is not decoded: files are copied in pieces, objects a few at a time."""
    # only the limits of size apply: a copied block is never in memory as a whole
    shape, unit = layout.shape, layout.first_block
    block = grown(unit, shape, range(len(shape)), layout.max_block(sizing))
    like = replace(like, passes=0, projected_memory=0, axes=())
    return replace(like, shape=shape, unit=unit, itemsize=layout.itemsize, block=block)
