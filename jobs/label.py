"""Entry point for `ray job submit -- python jobs/label.py`: the same arguments as `hts label`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["label", *sys.argv[1:]])
