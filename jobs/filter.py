"""`hts filter` as an entry point for `ray job submit -- python jobs/filter.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["filter", *sys.argv[1:]])
