"""What README shows is run: Python blocks in order, then commands, in one folder."""

import re
import shlex
from pathlib import Path

import dask
import pytest
from benchmarks import exact_sum
from click.testing import CliRunner

import daskclip
from daskclip.cli import EXIT_CODES, main

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """(command, output shown) of every line after a prompt."""
    parts = [p for block in blocks("console") for p in re.split(r"^\$ ", block, flags=re.M) if p]
    return [p.split("\n", 1) for p in parts]


def form(text):
    """``text`` with every figure replaced, since times, memory and encoded bytes differ."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", text)
    return re.sub(r"\d[\d.,]*", "#", text).strip()


def test_what_is_shown_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with dask.config.set(num_workers=2):
        names = {}
        for block in blocks("python"):
            exec(compile(block, README, "exec"), names)
        last = None
        for command, shown in commands():
            if command == "echo $?":
                assert shown.strip() == str(last)
                continue
            program, *arguments = shlex.split(command)
            assert program == "daskclip"
            result = CliRunner().invoke(main, arguments, prog_name=program)
            last = result.exit_code
            output = result.stdout or result.stderr
            if shown and arguments[0] == "plan":
                assert output.strip() == shown.strip()
            elif shown:
                assert form(output.replace(str(tmp_path), "/data")) == form(shown)
            else:
                assert last == 0, output
    assert last == 0


def test_blocks_are_found():
    assert len(blocks("python")) >= 5
    assert len(commands()) >= 4
    assert TEXT.count("```") == 2 * len(re.findall(r"^```(python|console|bash|text)$", TEXT, re.M))


def test_set_up_is_one_line_each():
    first, second = blocks("bash")[0].splitlines()
    assert first.endswith("examples/03_gradients.py")
    assert second.endswith("-m pytest -n 2")


@pytest.mark.parametrize("name", daskclip.__all__)
def test_public_name_is_shown(name):
    assert re.search(rf"\b{name}\b", TEXT)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_options_are_those_of_the_command_line(command):
    options = {o for p in main.commands[command].params for o in p.opts if o.startswith("--")}
    rows = re.findall(r"^\| `--[^|]*\|", TEXT, re.MULTILINE)
    assert options == {o for row in rows for o in re.findall(r"`(--[a-z-]+)", row)}


def test_exit_codes_are_those_of_the_command_line():
    listed = re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert ", ".join(f"{code} {meaning}" for code, meaning in listed) in " ".join(
        EXIT_CODES.removeprefix("\b").split()
    )


def test_table_is_the_one_the_benchmark_writes():
    nbytes = 2**16
    made = exact_sum.table(exact_sum.measure(nbytes, repeat=1), nbytes)
    shown = TEXT.split("<!-- begin: exact_sum -->\n")[1].split("\n\n")[0]
    # everything but the rates
    heads = [[line.split("|")[1:3] for line in t.splitlines()] for t in (made, shown)]
    assert heads[0] == heads[1]
