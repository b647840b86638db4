"""`hts train` as an entry point for `ray job submit -- python jobs/train.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
