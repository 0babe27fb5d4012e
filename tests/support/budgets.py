"""Whether refusals of memory budgets name the least one that works."""

import re

from daskclip.errors import MemoryBudgetError


def refusal(plan, mib):
    """MiB that the refusal of a budget proposes, or None where the budget is enough."""
    try:
        planned = plan(mib)
    except MemoryBudgetError as error:
        # on one line, which a point does not leave
        return int(re.fullmatch(r".*give memory='(\d+)MiB'.*", str(error))[1])
    assert planned.projected_memory <= mib * 2**20
    return None


def assert_least_memory_is_named(plan, mib):
    """Follow the refusals of ``plan``, a function of MiB, from some budget on."""
    least = refusal(plan, mib)
    while least is None and mib > 1:
        # less and less memory, until it is refused
        mib = mib * 3 // 4
        least = refusal(plan, mib)
    if least is None:
        return
    assert least > mib
    # all smaller budgets are refused with the same proposal, and no larger one is refused
    for less in {mib, (mib + least) // 2, least - 1} - {least}:
        assert refusal(plan, less) == least
    for more in (least, least + 1, least + 7, 2 * least, 100 * least):
        assert refusal(plan, more) is None
