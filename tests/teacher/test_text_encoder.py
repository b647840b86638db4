"""Tests of a CLIP's text tower as the judge of captions that the lexicon does not know."""

from __future__ import annotations

import numpy as np
import pytest

from hts_ray.classes import hico_classes
from hts_ray.config import CaptionConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher.actor import _matcher
from hts_ray.teacher.text_encoder import ClipTextEncoder


def test_unit_vectors_in_order() -> None:
    """Catches vectors of another text, or of any length but one."""
    encoder = ClipTextEncoder("builtin:world_clip")
    texts = ["a person riding a horse", "a dog", "a person riding a horse"]
    vectors = encoder(texts)
    assert vectors.shape[0] == 3
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert float(vectors[0] @ vectors[1]) < 0.999
    assert len(encoder([])) == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-B-32", "random numbers.*ViT-B-32@"),
        ("builtin:none", "no packaged model.*builtin:world_clip"),
        ("local-dir:/no/such/folder", "does not load"),
    ],
)
def test_what_does_not_load_is_named(name: str, told: str) -> None:
    """Catches similarities of random weights, and tracebacks for a mistyped name."""
    with pytest.raises(ConfigError, match=told) as caught:
        ClipTextEncoder(name)
    assert caught.value.field == "label.teacher.caption.text_encoder"


def test_the_encoder_helps_where_the_lexicon_is_silent() -> None:
    """Catches an encoder that is loaded, paid for and never asked."""
    table = hico_classes().subset(range(40))
    caption = ["a jockey at the track"]  # no class is said in words
    plain = _matcher(CaptionConfig(), table, "cpu")(caption)[0]
    settings = CaptionConfig(text_encoder="builtin:world_clip", similarity_floor=0.05)
    helped = _matcher(settings, table, "cpu")(caption)[0]
    assert max(plain.values(), default=0.0) < 0.5
    assert set(helped) > set(plain)
