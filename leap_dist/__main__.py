"""Entry point of the package: `python -m leap_dist COMMAND` is the same as `leap-dist COMMAND`."""

import sys

from leap_dist.cli.entry import run

if __name__ == "__main__":
    sys.exit(run())
