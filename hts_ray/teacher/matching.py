"""Where callers find `match_captions`; the grammar itself is `hts_ray.captions`."""

from hts_ray.captions.matching import match_captions

__all__ = ["match_captions"]
