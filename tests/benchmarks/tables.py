"""The generated tables of the READMEs and what they were measured on."""

import argparse
import datetime
import os
import platform
import re
import textwrap
from importlib.metadata import version
from pathlib import Path

from daskclip import __version__
from daskclip.arguments import parse_memory

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / folder / "README.md" for folder in ("", "tests/benchmarks", "examples/pipelines")]
END = "<!-- end -->"


def write(name, text):
    """Replace a table, on the page that has it."""
    begin = f"<!-- begin: {name} -->\n"
    page = next(path for path in PAGES if begin in path.read_text())
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + wrapped(text) + END + rest.split(END, 1)[1])


def wrapped(text):
    """``text`` in lines of up to 100 characters, except for the rows of tables."""
    return "".join(
        line if line.startswith(("|", "\n")) else f"{textwrap.fill(line, 100, **WHOLE)}\n"
        for line in text.splitlines(keepends=True)
    )


WHOLE = {"break_long_words": False, "break_on_hyphens": False}  # words and paths


def machine(*packages):
    """Processor, cores, versions and date."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}, "
        f"daskclip {__version__}; {datetime.date.today().isoformat()}"
    )


def cpu():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def options(text, arguments, **defaults):
    """The arguments that all modules take, and those with the defaults given."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the table on its page")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--only", nargs="*", default=[], help="parts of the names of cases, or contenders"
    )
    parser.add_argument("--folder", help="for temporary files")
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH",
        help="interpreter of a contender, such as cubed=/path/to/python",
    )  # fmt: skip
    for name, default in defaults.items():
        many = {"nargs": "*", "type": float} if isinstance(default, list) else {}
        parser.add_argument(f"--{name}", default=default, **many)
    chosen = parser.parse_args(arguments)
    chosen.python = dict(item.split("=", 1) for item in chosen.python)
    if "size" in defaults:
        chosen.size = parse_memory(chosen.size)
    return chosen
