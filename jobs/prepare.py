"""`hts prepare` as an entry point for `ray job submit -- python jobs/prepare.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
