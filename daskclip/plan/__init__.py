"""Plans of a run, in integers: blocks, slabs, passes and memory.

Pure functions of shapes and sizes: nothing here opens a store or holds a value of an array.

    group ──> choose    each array by itself
          └──> joint    arrays that have norms in common: the same kept positions in each block
"""

from daskclip.plan import sizing
from daskclip.plan.group import plan_group
from daskclip.plan.plans import ClipPlan, GroupPlan
from daskclip.plan.sizing import Layout, Machine

__all__ = ["ClipPlan", "GroupPlan", "Layout", "Machine", "plan_group", "sizing"]
