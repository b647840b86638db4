"""How much memory a captioner's forwards take, estimated from its settings.

What grows with the number of regions is estimated from above, so that a batch can be cut into
groups before it is too large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Caches, activations and masks of one group of regions, in bytes. The vocabulary's logits
# (`trie.MAX_LOGITS`) come on top. A few hundred nodes of a few regions keep a GPU busy.
WORKSPACE = 192 << 20
_ACTIVATIONS = 8  # hidden states alive in a layer: residual, norm, queries, keys, values, output
_GATED = 3  # a gated feed-forward holds gate, up and their product


@dataclass(frozen=True)
class Footprint:
    """The sizes of a captioner that its memory depends on.

    `cached` is the keys' and values' numbers a token, over all layers; `active` the numbers a
    token takes within a layer; `heads` the attention heads. `vision` are numbers a pixel takes
    within the image encoder. `itemsize` is in bytes.
    """

    cached: int
    active: int
    heads: int
    width: int
    itemsize: int
    eager: bool
    vision: float = 0.0

    def region(self, context: int, nodes: int, *, features: int = 0, pixels: int = 0) -> int:
        """Return bytes for a region of so many prefix tokens, fed nodes, features and pixels."""
        seen = context + nodes
        numbers = self.cached * (seen + features) + self.active * max(context, nodes)
        numbers += 4 * self.width * (seen + features)  # one layer's keys and values, concatenated
        scores = nodes * (seen + features) * (self.heads if self.eager else 1)
        # Eager attention makes scores of every head and takes their softmax in float32.
        scores_bytes = scores * (2 * 4 + self.itemsize if self.eager else 2 * self.itemsize)
        return int((numbers + self.vision * pixels) * self.itemsize + scores_bytes)


def footprint(model: Any) -> Footprint:
    """Read the sizes of a transformers captioner from its config."""
    text = getattr(model.config, "decoder", None) or model.config.get_text_config(decoder=True)
    heads = int(_first(text, "decoder_attention_heads", "num_attention_heads", default=1))
    width = int(_first(text, "hidden_size", "d_model", default=1))
    head_width = int(_first(text, "head_dim", "d_kv", default=0)) or width // heads
    kv_heads = int(_first(text, "num_key_value_heads", default=0)) or heads
    layers = int(
        _first(text, "num_decoder_layers", "decoder_layers", "num_hidden_layers", default=1)
    )
    inner = int(
        _first(text, "intermediate_size", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner")
        or 4 * width
    )
    return Footprint(
        cached=2 * layers * kv_heads * head_width,
        active=_GATED * inner + _ACTIVATIONS * max(width, heads * head_width),
        heads=heads,
        width=heads * head_width,
        itemsize=model.dtype.itemsize,
        eager=_first(text, "_attn_implementation") == "eager",
        vision=_vision_numbers(model.config),
    )


def _vision_numbers(config: Any) -> float:
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None)
    width = _first(vision, "hidden_size", "embed_dim", default=0)
    patch = _first(vision, "patch_size", default=16)
    if not isinstance(width, int) or not isinstance(patch, int):
        return 64.0  # a pyramid of convolutions, as Florence-2's
    inner = _first(vision, "intermediate_size") or 4 * width
    return float(_GATED * inner + _ACTIVATIONS * width) / (patch * patch)


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of the named settings that is set."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default
