"""Kills, errors and power losses at any file operation: no wrong byte, and the next run resumes."""

import errno
import os

import pytest
from faults import CASES, Sweep

from daskclip.storage import durable

CODES = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT]
case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# together they run all code that the other cases run
some = [CASES[0], *CASES[2:4], CASES[5]]
four = pytest.mark.parametrize("case", some, ids=lambda case: case.name)


def without_syncing():
    """A defect: nothing is synced."""
    os.fsync = lambda descriptor: None
    durable.sync_filesystem = lambda folder: None


@case
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power loss"])
def test_a_kill_at_some_file_operations(case, power):
    sweep = Sweep(case)
    sweep.kills(range(7, sweep.operations + 1, 40), power)
    assert sweep.points
    assert not sweep.violations


@pytest.mark.slow
@four
def test_a_kill_at_every_file_operation(case):
    sweep = Sweep(case)
    sweep.kills(range(1, sweep.operations + 1))
    assert sweep.points > 1.9 * sweep.operations > 140
    assert not sweep.violations


@pytest.mark.slow
@four
def test_a_power_loss_at_every_file_operation(case):
    sweep = Sweep(case)
    sweep.kills(range(1, sweep.operations + 1), power=True)
    assert sweep.points > 1.9 * sweep.operations
    assert sweep.lost
    assert not sweep.violations


@case
def test_the_power_loss_model_sees_what_is_not_synced(case):
    sweep = Sweep(case, without_syncing)
    sweep.kills(range(3, sweep.operations + 1, 12), power=True)
    assert sweep.lost
    assert sweep.violations


@pytest.mark.slow
@case
def test_errors_from_every_file_operation_on(case):
    sweep = Sweep(case)
    sweep.fails(range(1, sweep.operations + 1), CODES)
    assert sweep.points == sweep.operations >= 50
    assert not sweep.violations


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_errors_from_some_file_operations_on(code):
    sweep = Sweep(CASES[0])
    sweep.fails(range(1, sweep.operations + 1, 12), [code])
    assert sweep.points
    assert not sweep.violations
