"""`hts evaluate` as an entry point for `ray job submit -- python jobs/evaluate.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
