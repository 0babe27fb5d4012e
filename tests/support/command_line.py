"""The command line, in this process or in a process of its own."""

import subprocess
import sys

from click.testing import CliRunner

from daskclip.cli import main

DASKCLIP = [sys.executable, "-c", "from daskclip.cli import main; main()"]


def run(*args):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def shell(*args, code=None, **options):
    """Run the command line in a process of its own, after ``code``."""
    command = [sys.executable, "-c", f"{code}; {DASKCLIP[2]}"] if code else DASKCLIP
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, check=False, **options
    )


def assert_fails(done, code, *words):
    """Check the exit code, and that the only output is one line on stderr with ``words``."""
    assert done.stdout == ""
    line = done.stderr.removesuffix("\n")
    assert line.startswith("daskclip: ")
    assert "\n" not in line
    assert "Traceback" not in line
    for word in words:
        assert str(word) in line
    assert getattr(done, "exit_code", getattr(done, "returncode", None)) == code
