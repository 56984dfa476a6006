"""Entry point of a checkout: `python launch.py COMMAND` is the same as `leap-dist COMMAND`."""

import sys

from leap_dist.cli.entry import run

if __name__ == "__main__":
    sys.exit(run())
