"""`hts sweep` as an entry point for `ray job submit -- python jobs/sweep.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
