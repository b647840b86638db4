"""`hts predict` as an entry point for `ray job submit -- python jobs/predict.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
