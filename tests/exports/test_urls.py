"""Addresses of images for browsers."""

from __future__ import annotations

import pytest

from hts_ray.errors import ConfigError
from hts_ray.exports.urls import image_url


def test_the_prefix_stands_for_the_root():
    """Catches names with spaces or marks that break an address, and double quoting."""
    prefix = "https://host/x/"
    assert image_url("/d/photos/a b#1.jpg", prefix, "/d/photos/") == (
        "https://host/x/a%20b%231.jpg"
    )
    assert image_url("s3://bucket/p/a%20b.jpg", prefix, "s3://bucket/p") == (
        "https://host/x/a%20b.jpg"
    )
    local = "/data/local-files/?d=photos/"
    assert image_url("/d/photos/sub/a.jpg", local, "/d/photos") == f"{local}sub/a.jpg"
    assert image_url("/anything", None, None) == "/anything"


def test_images_outside_the_root_are_told():
    """Catches an address that is quietly wrong: /d/photos2 does not lie in /d/photos."""
    with pytest.raises(ConfigError, match=r"export\.image_root"):
        image_url("/d/photos2/a.jpg", "https://host/", "/d/photos")
    with pytest.raises(ConfigError, match=r"set export\.image_root too"):
        image_url("/d/a.jpg", "https://host/", None)
