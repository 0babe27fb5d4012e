"""The tables of README and what they were measured on."""

import argparse
import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from daskclip import __version__
from daskclip.arguments import parse_memory

README = Path(__file__).parents[2] / "README.md"
END = "<!-- end -->"


def write(name, text):
    """Replace a table of README."""
    begin = f"<!-- begin: {name} -->\n"
    before, rest = README.read_text().split(begin)
    README.write_text(before + begin + text + END + rest.split(END, 1)[1])


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
    parser.add_argument("--write", action="store_true", help="replace the table of README")
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
