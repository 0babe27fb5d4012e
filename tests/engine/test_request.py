"""Arguments as one object, and records of journals as JSON."""

import dataclasses
import inspect
import json

import pytest
import zarr
from budgets import refusal
from stores import stopping_at

from daskclip import clip_zarr, plan_zarr, stats_zarr
from daskclip.engine.request import ClipRequest
from daskclip.errors import InvalidTypeError
from daskclip.target import BlocksRecord, FinalRecord, Journal, RunRecord, journal


def test_plan_and_request_take_the_arguments_of_clip_zarr():
    wanted = inspect.signature(clip_zarr).parameters
    assert inspect.signature(plan_zarr).parameters == wanted
    fields = {f.name: f.default for f in dataclasses.fields(ClipRequest) if f.init}
    del fields["clips"], fields["wide"]
    defaults = {name: one.default for name, one in wanted.items()}
    # these two have none in a call
    assert {**fields, "source": None, "target": None} == {
        **defaults,
        "source": None,
        "target": None,
    }


def test_a_request_is_parsed_once_and_frozen():
    request = ClipRequest(source="x", target="y", clip_norm="p99", memory="1kB")
    assert (request.limit, request.memory_nbytes) == (99, 1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.limit = 1.0
    with pytest.raises(InvalidTypeError, match="clip_norm None"):
        ClipRequest(source="x")
    assert ClipRequest(source="x", clips=False).limit is None


def test_records_are_stored_in_the_format_of_version_7(tmp_path):
    path = tmp_path / "journal"
    run = RunRecord(parameters={"axes": [0]}, source={"hash": "a"}, id="7", began="now", plans={})
    window = BlocksRecord(tally=(1, 2), target={3: 4})
    sums = BlocksRecord(slab="0-0", sums="sums-0", source={5: 6})
    final = FinalRecord(report={"slices": 1}, made={"metadata": 2})
    journal.begin(path, run)
    with Journal(path) as entries:
        assert not [*entries.replay()]
        for record in (window, sums):
            entries.append(record)
        entries.append(final)
    lines = [json.loads(line[9:]) for line in path.read_bytes().splitlines()]
    assert lines == [
        {
            "version": 7, "parameters": {"axes": [0]}, "source": {"hash": "a"}, "run": "7",
            "began": "now", "plans": {},
        },
        {"tally": [1, 2], "target": {"3": 4}},
        {"slab": "0-0", "sums": "sums-0", "source": {"5": 6}},
        {"report": {"slices": 1}, "made": {"metadata": 2}},
    ]  # fmt: skip
    assert journal.header(path) == run
    assert journal.final(path) == final
    stored = [*journal.records(path)]
    assert stored == [run, dataclasses.replace(window, tally=[1, 2]), sums, final]


def test_a_journal_is_replayed_and_ended_once(tmp_path):
    path = tmp_path / "journal"
    journal.begin(path, RunRecord())
    window, final = BlocksRecord(target={}), FinalRecord(report={}, made={})
    for attempt in range(3):
        journal.cut_torn_end(path)
        with Journal(path) as entries:
            assert [*entries.replay()] == ([window] if attempt else [])
            if not attempt:
                entries.append(window)
            assert entries.ended() == (final if attempt else None)
            if not attempt:
                entries.append(final)
    assert [*journal.records(path)] == [RunRecord(), window, final]


@pytest.mark.parametrize("kind", ["new", "overwrite", "resumed", "norms", "norms, resumed"])
def test_the_memory_that_a_refusal_asks_for_is_the_least_that_works(tmp_path, monkeypatch, kind):
    x = zarr.create_array(tmp_path / "x", shape=(96, 512, 256), chunks=(1, 512, 256), dtype="f4")
    x[:] = 1.0
    how = {"norms": tmp_path / "norms"} if "norms" in kind else {}
    if how:
        stats_zarr(tmp_path / "x", 0, memory="150MiB", save_norms=tmp_path / "norms")

    def clip(mib):
        return clip_zarr(tmp_path / "x", tmp_path / "y", 1.0, 0, memory=f"{mib}MiB", **how)

    if kind == "overwrite":
        clip_zarr(tmp_path / "x", tmp_path / "y", 2.0, 0)
        how["overwrite"] = True
    if "resumed" in kind:
        stopping_at(monkeypatch)[0] = 1
        with pytest.raises(KeyboardInterrupt):
            clip(200)
        monkeypatch.undo()
    before = sorted(p.name for p in tmp_path.iterdir())
    least = refusal(clip, 1)
    for less in (least // 2, least - 1):
        assert refusal(clip, less) == least
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert clip(least).status == "clipped"
    if "norms" not in kind:
        assert clip(1).status == "up to date"
