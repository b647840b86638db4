"""The `hts` command: one subcommand a stage.

Exit codes: 0 done, 1 failed, 2 bad usage or bad configuration, 130 stopped by Ctrl-C.
"""

from hts_ray.cli.app import cli, main

__all__ = ["cli", "main"]
