"""`hts report` as an entry point for `ray job submit -- python jobs/report.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
