"""Runs the command line as `python -m rankfold`."""

from rankfold.cli import main

main()
