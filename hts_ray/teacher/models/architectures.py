"""How each family reads a region and goes on behind it: cross-attention, prefix, or both.

A reader is `encode`, `forward` and `reference` of a `Decoder`; each comes in a class that scores
by trie and, where a text model of the family may refuse a tree mask, one that scores by batches.

Shape legend: R regions, N tokens fed at a time, K start tokens, L tokens of a prefix, D hidden
width, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hts_ray.engine.compat import rope_deltas
from hts_ray.teacher.models.inputs import collate, extended
from hts_ray.teacher.scoring import trie as prompt_tree
from hts_ray.teacher.scoring.decoders import (
    BatchedDecoder,
    Decoder,
    Prefix,
    TrieDecoder,
    capture_hidden,
    sequence_log_likelihood,
)
from hts_ray.teacher.scoring.memory import footprint
from hts_ray.teacher.scoring.trie import TokenIds


class _Sized(Decoder):
    """What regions and prompts take in memory, from the model's config."""

    def __init__(self, model: Any, head: nn.Module, **ids: Sequence[int]) -> None:
        super().__init__(model, head, **ids)
        self.footprint = footprint(model)

    def _context(self, image: Any) -> tuple[int, int]:
        """Return a prepared region's tokens in front of the prompts, and its features."""
        return len(image["input_ids"][0]), 0

    def region_bytes(self, image: Any, nodes: int | None = None) -> int:
        """Return about how many bytes a region takes while it is read and `nodes` are fed."""
        pixels = image if isinstance(image, Tensor) else image["pixel_values"]
        context, features = self._context(image)
        if nodes is None:
            nodes = prompt_tree.MAX_NODES if isinstance(self, TrieDecoder) else 1
        held = pixels.numel() * pixels.element_size()
        return held + self.footprint.region(
            context, nodes, features=features, pixels=pixels.numel() // 3
        )

    def row_bytes(self, prefix: Prefix, longest: int) -> int:
        """Return about how many bytes a prompt takes behind a prefix."""
        features = prefix.features[0].shape[1] if prefix.features else 0
        return self.footprint.region(prefix.past, longest, features=features)


class _CrossAttention(_Sized):
    """Captioners whose text decoder attends to an image's features: BLIP, VisionEncoderDecoder.

    `features` turns pixels (R, 3, H, W) into the decoder's encoder_hidden_states;
    `first_position` is the position id of the first start token, None for a decoder that takes
    no position ids.
    """

    def __init__(
        self,
        model: Any,
        language_model: Any,
        features: Callable[[Tensor], Tensor],
        *,
        start_ids: Sequence[int],
        end_ids: Sequence[int],
        first_position: int | None = 0,
    ) -> None:
        head = language_model.get_output_embeddings()
        super().__init__(model, head, start_ids=start_ids, end_ids=end_ids)
        self.language_model = language_model
        self.features = features
        self.first_position = first_position

    def _context(self, image: Tensor) -> tuple[int, int]:
        vision = getattr(self.model.config, "vision_config", None) or self.model.config.encoder
        patch = getattr(vision, "patch_size", None) or 16
        patches = image.numel() // 3 // (patch * patch) if isinstance(patch, int) else 0
        return len(self.start_ids), patches + 1

    def encode(self, images: Tensor) -> Prefix:
        """Compute the image features (R, patches, D) and read the start tokens."""
        from transformers import DynamicCache, EncoderDecoderCache

        features = self.features(images)
        regions, device = len(features), features.device
        count = len(self.start_ids)
        first = (self.first_position or 0) + count
        prefix = Prefix(
            # The cross-attention's keys and values are kept too: they serve every node.
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            root=features[:, :1],
            first_position=torch.full((regions,), first, device=device),
            features=(features,),
        )
        start = torch.tensor(self.start_ids, device=device).expand(regions, count)
        positions = torch.arange(first - count, first, device=device).expand(regions, count)
        mask = None
        if self.first_position is not None:
            least = torch.finfo(features.dtype).min
            above = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
            mask = torch.zeros(regions, 1, count, count, dtype=features.dtype, device=device)
            mask.masked_fill_(above, least)
        hidden, _ = capture_hidden(self.head, lambda: self.forward(prefix, start, positions, mask))
        prefix.root = hidden[:, -1:]
        return prefix

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the text decoder with its caches of both attentions."""
        known = {} if self.first_position is None else {"position_ids": positions}
        return self.language_model(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=prefix.features[0],
            past_key_values=prefix.cache,
            use_cache=True,
            **known,
        )

    def reference(self, images: Tensor, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) by the decoder's own causal mask and positions."""
        ids = torch.tensor([[*self.start_ids, *sequence]], device=images.device)
        logits = self.language_model(
            input_ids=ids.expand(len(images), -1),
            encoder_hidden_states=self.features(images),
            use_cache=False,
        ).logits
        return sequence_log_likelihood(logits[:, len(self.start_ids) - 1 : -1], sequence)


class CrossAttentionDecoder(_CrossAttention, TrieDecoder):
    """Cross-attention by trie: the text decoder takes position ids and a tree mask."""


class BatchedCrossAttentionDecoder(_CrossAttention, BatchedDecoder):
    """Cross-attention by batches, such as TrOCR's decoder, which counts positions itself."""


class GitDecoder(_Sized, TrieDecoder):
    """GIT: the image is a prefix of the text, held with the start tokens in the cache."""

    def __init__(self, model: Any, *, start_ids: Sequence[int], end_ids: Sequence[int]) -> None:
        super().__init__(model, model.get_output_embeddings(), start_ids=start_ids, end_ids=end_ids)

    def _context(self, image: Tensor) -> tuple[int, int]:
        patch = self.model.config.vision_config.patch_size
        return image.numel() // 3 // (patch * patch) + 1 + len(self.start_ids), 0

    def encode(self, images: Tensor) -> Prefix:
        """Read image and start tokens."""
        start = torch.tensor(self.start_ids, device=images.device).expand(len(images), -1)
        hidden, output = capture_hidden(
            self.head, lambda: self.model(pixel_values=images, input_ids=start, use_cache=True)
        )
        # GIT counts text positions from its own start; left to itself with a cache it would
        # count the image's tokens too.
        first = torch.full((len(images),), len(self.start_ids), device=images.device)
        return Prefix(output.past_key_values, hidden[:, -1:], first)

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the decoder behind the cached image and start tokens."""
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=prefix.cache,
            attention_mask=mask,
        )

    def reference(self, images: Tensor, sequence: TokenIds) -> Tensor:
        """Return the sum (R,) of one full forward, image included."""
        ids = torch.tensor([[*self.start_ids, *sequence]], device=images.device)
        logits = self.model(
            pixel_values=images, input_ids=ids.expand(len(images), -1), use_cache=False
        ).logits
        return sequence_log_likelihood(logits[:, -len(sequence) - 1 : -1], sequence)


class PrefixStyle:
    """What decoder-only families do differently around one way of reading.

    This one is LLaVA's, LLaVA-OneVision's and SmolVLM's: positions count from 0 over what is not
    padding, and the model itself runs behind its prefix.
    """

    first = 0
    pads = True  # whether prefixes of unequal length can be read together

    def language_model(self, model: Any) -> Any:
        """Return what runs on tokens behind the prefix."""
        return model

    def cache(self, output: Any) -> Any:
        """Return the cache of the forward that read the prefix."""
        return output.past_key_values

    def prefix_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the position ids of a prefix of which `mask` (R, L) tells what is no padding."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + self.first}

    def first_position(self, model: Any, mask: Tensor) -> Tensor:
        """Return the position ids (R,) of the first prompt token, after the prefix is read."""
        return mask.sum(1) + self.first

    def positions(self, positions: Tensor) -> dict[str, Tensor]:
        """Return what tells the model the positions (R, N) of prompt tokens."""
        return {"position_ids": positions}

    def softcap(self, model: Any) -> float | None:
        """Return the c of logits that the model squashes to c tanh(logit / c), if it does."""
        return None


class PaliGemmaStyle(PrefixStyle):
    """PaliGemma: positions from 1; token types make image and instruction see each other."""

    first = 1

    def softcap(self, model: Any) -> float | None:
        """Return Gemma 2's bound."""
        return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


class QwenStyle(PrefixStyle):
    """Qwen-VL: three position ids a token, which an image's grid makes jump."""

    def prefix_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return nothing: the model finds them from grid and padding mask."""
        return {}

    def first_position(self, model: Any, mask: Tensor) -> Tensor:
        """Return where text goes on: an image takes fewer positions than it has tokens."""
        return mask.sum(1) + rope_deltas(model)[:, 0].to(mask.device)

    def positions(self, positions: Tensor) -> dict[str, Tensor]:
        """Return time, height and width, which are one number for text: (3, R, N)."""
        return {"position_ids": positions.expand(3, *positions.shape)}


class QFormerStyle(PrefixStyle):
    """BLIP-2 and InstructBLIP: the language model goes on without the image's part."""

    pads = False  # a Q-Former's queries are as many for every image

    def language_model(self, model: Any) -> Any:
        """Return the text model with its head."""
        return model.language_model

    def cache(self, output: Any) -> Any:
        """Return the text model's cache."""
        return output.language_model_outputs.past_key_values


class KosmosStyle(PrefixStyle):
    """Kosmos-2: the text model counts positions from its cache."""

    pads = False

    def language_model(self, model: Any) -> Any:
        """Return the text model with its head."""
        return model.text_model

    def positions(self, positions: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class _PrefixReader(_Sized):
    """Decoder-only captioners: image and instruction are tokens in front of the prompt.

    Prepared regions are mappings of the model's inputs, as the processor makes them of one
    region; `pad_id` fills the token ids of shorter prefixes on the left.
    """

    def __init__(
        self, model: Any, style: PrefixStyle, *, end_ids: Sequence[int], pad_id: int
    ) -> None:
        super().__init__(model, model.get_output_embeddings(), end_ids=end_ids)
        self.style = style
        self.pad_id = pad_id
        self.bound = style.softcap(model)

    def joins(self, first: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
        """Tell whether two regions can be read together: padded, or of one length."""
        return self.pads or first["input_ids"].shape == image["input_ids"].shape

    @property
    def pads(self) -> bool:
        """Whether prefixes are padded: not behind a batch of prompts, which has no mask."""
        return self.style.pads and isinstance(self, TrieDecoder)

    def encode(self, images: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Read image and instruction of R regions."""
        device = self.model.device
        inputs = {name: value.to(device) for name, value in self._together(images).items()}
        mask = inputs["attention_mask"]
        padded = not bool(mask.all())
        positions = self.style.prefix_positions(mask) if padded else {}
        hidden, output = capture_hidden(
            self.head, lambda: self.model(**inputs, **positions, use_cache=True)
        )
        root = hidden[:, -1:]
        return Prefix(
            self.style.cache(output),
            root,
            self.style.first_position(self.model, mask).to(root.device),
            visible=mask.bool().to(root.device) if padded else None,
        )

    def _together(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        regions = list(images)
        assert self.pads or all(self.joins(regions[0], region) for region in regions)
        return collate(regions, self.pad_id)

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the language model behind the cached image and instruction."""
        return self.style.language_model(self.model)(
            input_ids=tokens,
            past_key_values=prefix.cache,
            attention_mask=mask,
            use_cache=True,
            **self.style.positions(positions),
        )

    def reference(self, images: Sequence[Mapping[str, Tensor]], sequence: TokenIds) -> Tensor:
        """Return the sums (R,) of one full forward a region, image and instruction included."""
        device = self.model.device
        tokens = torch.tensor([sequence])
        sums = []
        for image in images:
            inputs = extended(image, tokens)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            logits = _logits(self.model(**inputs, use_cache=False))
            sums.append(sequence_log_likelihood(logits[:, -len(sequence) - 1 : -1], sequence))
        return torch.cat(sums)

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) float32, squashed where the model does so behind its head."""
        logits = super().project(hidden)
        return logits if self.bound is None else (logits / self.bound).tanh() * self.bound


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


class PrefixTrieDecoder(_PrefixReader, TrieDecoder):
    """Decoder-only captioners by trie; regions of differing length are padded on the left."""


class PrefixBatchedDecoder(_PrefixReader, BatchedDecoder):
    """Decoder-only captioners by batches: regions are read together where lengths agree."""


class _SequenceToSequence(_Sized):
    """Captioners that read image and instruction with an encoder: BLIP-2 T5, Florence-2.

    `language_model` is what runs on prompt tokens, with the head.
    """

    def __init__(
        self,
        model: Any,
        language_model: Any,
        *,
        start_ids: Sequence[int],
        end_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        head = language_model.get_output_embeddings()
        super().__init__(model, head, start_ids=start_ids, end_ids=end_ids)
        self.language_model = language_model
        self.pad_id = pad_id

    def _context(self, image: Mapping[str, Tensor]) -> tuple[int, int]:
        return len(self.start_ids), len(image["input_ids"][0])

    def joins(self, first: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
        """Tell whether two regions can be read together: those of one length."""
        return first["input_ids"].shape == image["input_ids"].shape

    def encode(self, images: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Run the encoder on image and instruction, and the decoder on the start tokens."""
        device = self.model.device
        inputs = collate(list(images), self.pad_id)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        regions = len(inputs["input_ids"])
        start = torch.tensor(self.start_ids, device=device).expand(regions, -1)
        hidden, output = capture_hidden(
            self.head, lambda: self.model(**inputs, decoder_input_ids=start, use_cache=True)
        )
        output = getattr(output, "language_model_outputs", output)
        root = hidden[:, -1:]
        first = torch.full((regions,), len(self.start_ids), device=root.device)
        features = (output.encoder_last_hidden_state, inputs["attention_mask"])
        return Prefix(output.past_key_values, root, first, features=features)

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the decoder with its caches of both attentions."""
        from transformers.modeling_outputs import BaseModelOutput

        features, feature_mask = prefix.features
        return self.language_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=features),
            attention_mask=feature_mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=mask,
            past_key_values=prefix.cache,
            use_cache=True,
        )

    def reference(self, images: Sequence[Mapping[str, Tensor]], sequence: TokenIds) -> Tensor:
        """Return the sums (R,) of one full forward a region."""
        device = self.model.device
        ids = torch.tensor([[*self.start_ids, *sequence]], device=device)
        sums = []
        for image in images:
            inputs = {name: value.to(device) for name, value in image.items()}
            logits = _logits(self.model(**inputs, decoder_input_ids=ids, use_cache=False))
            sums.append(sequence_log_likelihood(logits[:, len(self.start_ids) - 1 : -1], sequence))
        return torch.cat(sums)


class BatchedSequenceToSequenceDecoder(_SequenceToSequence, BatchedDecoder):
    """T5, whose position bias counts from the cache: prompts in batches."""


class Florence2Decoder(_SequenceToSequence, TrieDecoder):
    """Florence-2: BART's decoder takes a tree mask but no position ids.

    `table` is its table of positions.
    """

    def __init__(self, model: Any, table: nn.Module, **rest: Any) -> None:
        super().__init__(model, model, **rest)
        self.table = table

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the decoder with each token at its own position."""
        with _positions_of(self.table, positions):
            return super().forward(prefix, tokens, positions, mask)


@contextmanager
def _positions_of(table: nn.Module, positions: Tensor) -> Iterator[None]:
    """Make a table of learned positions answer for `positions` (R, N) whatever it is asked.

    BART counts rows. Correcting the embeddings for it would round twice at half precision and
    hold for as many nodes only as the table has rows.
    """
    offset: int = table.offset  # type: ignore[assignment]
    weight: Tensor = table.weight  # type: ignore[assignment]

    def ask_little(_module: nn.Module, _args: Any, _kwargs: Any) -> tuple[Any, Any]:
        return (positions[:1, :1] * 0,), {}

    def answer(_module: nn.Module, _args: Any, _output: Tensor) -> Tensor:
        return nn.functional.embedding(positions.to(weight.device) + offset, weight)

    handles = [
        table.register_forward_pre_hook(ask_little, with_kwargs=True),
        table.register_forward_hook(answer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
