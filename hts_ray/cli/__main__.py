"""`python -m hts_ray.cli`, where the script `hts` is not on the path."""

from hts_ray.cli import main

if __name__ == "__main__":
    main()
