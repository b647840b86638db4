"""Captions of three styles against the floors that they were written for."""

from __future__ import annotations

import caption_styles
import pytest


@pytest.mark.parametrize("half", ["tune", "held"])
@pytest.mark.parametrize(
    ("style", "precision", "recall"),
    [("human_style", 0.95, 0.88), ("chat_style", 0.92, 0.8), ("own_names", 0.95, 0.8)],
)
def test_styles_of_text(style: str, precision: float, recall: float, half: str) -> None:
    """Catches a loss on plain captions, on chat models' or on a user's own class names."""
    counts, _ = caption_styles.counted(style, half)
    assert counts["precision"] >= precision
    assert counts["recall"] >= recall
