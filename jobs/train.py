"""Entry point for `ray job submit -- python jobs/train.py`: the same arguments as `hts train`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
