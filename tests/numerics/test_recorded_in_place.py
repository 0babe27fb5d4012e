"""A block that is clipped in place has the bits of one that is not, for the recorded cases."""

import numpy as np
import pytest
from recorded import GROUPS, canonical, make

from daskclip import clip_by_norm
from daskclip.numerics import clip_block

THEMES = ("any", "special", "limits", "tiny", "runs", "far")


@pytest.mark.parametrize("theme", THEMES)
def test_blocks_clipped_in_place_have_the_same_bits(theme):
    checked = 0
    for of, name, ord, numbers in GROUPS.values():
        for number in numbers if of == theme else ():
            case = make(of, name, ord, number)
            x, limit = case.x, case.limit
            if not x.flags.writeable:
                continue
            one = {"limits": limit} if np.ndim(limit) else {"clip_norm": limit}
            how = {"ord": ord, "axes": case.axes, "nonfinite": case.nonfinite}
            y, norms = clip_by_norm(x, **one, **how, return_norm=True)
            axes = tuple(range(x.ndim)) if case.axes is None else case.axes
            limit = np.asarray(limit, np.float64)
            if limit.ndim:
                limit = limit[(None,) * (x.ndim - limit.ndim) + (...,)]
            omit = case.nonfinite == "omit"
            inside, scale = clip_block(x, limit, axes, omit_nan=omit, ord=ord, out=x)
            where = f"{theme}/{name}/{ord} {number}"
            assert inside is x, where
            assert_same(inside, y, where)
            assert_same(scale.norm.squeeze(axes), norms, where)
            checked += 1
    assert checked > 90


def assert_same(found, expected, where):
    (form, bits), (other, others) = canonical(found), canonical(expected)
    assert form == other, where
    assert bits.tobytes() == others.tobytes(), where
