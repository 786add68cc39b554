"""Runs the command `wsm-ds` as `python -m wsm_ds`."""

import sys

from wsm_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
