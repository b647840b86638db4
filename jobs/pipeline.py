"""`hts pipeline` as an entry point for `ray job submit -- python jobs/pipeline.py`."""

import sys

from hts_ray.cli import main

if __name__ == "__main__":
    main(["pipeline", *sys.argv[1:]])
