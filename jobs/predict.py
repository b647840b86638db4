"""Entry point for `ray job submit -- python jobs/predict.py`: the same arguments as `hts predict`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
