"""`hts label` as an entry point for `ray job submit -- python jobs/label.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["label", *sys.argv[1:]])
