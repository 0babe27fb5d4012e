"""The bits that 0.1.0 gives, for cases of every dtype, norm, layout and kind of limit.

Digests of them are in data/recorded_bits.json. NumPy and the compiled loops of 0.1.0, which were
two implementations, agreed on every case. `recorded` makes the cases, and shows one that differs.
"""

import json

import pytest
from recorded import GROUPS, RECORDED, differing, digest_of

EXPECTED = json.loads(RECORDED.read_text())


def test_every_group_is_recorded():
    assert list(GROUPS) == list(EXPECTED)


@pytest.mark.parametrize("group", GROUPS)
def test_the_bits_are_those_of_0_1_0(group):
    found = digest_of(group)
    if found != EXPECTED[group]:
        wrong = differing(group, found, EXPECTED[group])
        pytest.fail(
            f"cases {wrong} of {group} have other bits than 0.1.0 gave; "
            f"python tests/support/recorded.py {group} {wrong[0]} shows the first",
            pytrace=False,
        )
