"""The command line as ``python -m daskclip``."""

from daskclip.cli import main

main(prog_name="daskclip")
