"""Addresses of images for tools that load them over HTTP."""

from __future__ import annotations

from urllib.parse import quote, unquote

from hts_ray.errors import ConfigError
from hts_ray.store import storage


def image_url(uri: str, prefix: str | None, root: str | None) -> str:
    """Return where a browser finds the image at `uri`: `prefix` in place of the folder `root`.

    Without a prefix the uri itself. Raises ConfigError when the image does not lie in `root`, or
    no root is known.
    """
    if prefix is None:
        return uri
    if root is None:
        raise ConfigError(
            field="export.image_url_prefix",
            value=prefix,
            remedy="set export.image_root too: the folder whose images the prefix stands for",
        )
    base = root.rstrip("/") + "/"
    if not uri.startswith(base):
        raise ConfigError(
            field="export.image_root",
            value=root,
            remedy=f"the image {uri} does not lie in it: name a folder that holds all images",
        )
    path = uri[len(base) :]
    # Remote uris are quoted already, local paths are not.
    return prefix + quote(unquote(path) if storage.is_remote(uri) else path)
