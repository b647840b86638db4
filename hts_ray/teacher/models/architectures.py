"""How each family reads a region and then a prompt: by cross-attention, as a prefix, or both.

Each class is `encode`, `forward` and `reference` of a `Decoder`.

Shape legend: R regions, N tokens fed at a time, K start tokens, L tokens of a prefix, D hidden
width, H x W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hts_ray.engine.compat import crop_text, rope_deltas
from hts_ray.teacher.models.inputs import collate, extended, to_device
from hts_ray.teacher.scoring.decoders import (
    Decoder,
    Prefix,
    capture_hidden,
    sequence_log_likelihood,
)
from hts_ray.teacher.scoring.trie import TokenIds


class CrossAttentionDecoder(Decoder):
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
        first_position: int | None = 0,
        **rest: Any,
    ) -> None:
        super().__init__(model, language_model.get_output_embeddings(), **rest)
        self.language_model = language_model
        self.features = features
        self.first_position = first_position

    def context(self, image: Tensor) -> tuple[int, int]:
        """Return the start tokens and the patches, which the decoder attends to."""
        vision = getattr(self.model.config, "vision_config", None) or self.model.config.encoder
        patch = getattr(vision, "patch_size", None) or 16
        patches = image.numel() // 3 // (patch * patch) if isinstance(patch, int) else 0
        return len(self.start_ids), patches + 1

    def taken(self, image: Any) -> int:
        """Return the start tokens, from the first position on."""
        return (self.first_position or 0) + len(self.start_ids)

    def encode(self, images: Tensor) -> Prefix:
        """Compute the image features (R, patches, D) and read the start tokens."""
        from transformers import DynamicCache, EncoderDecoderCache

        features = self.features(images)
        first = torch.full((len(features),), self.first_position or 0, device=features.device)
        # The cross-attention's keys and values are kept too: they serve every node.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        prefix = Prefix(cache, features[:, :1], first, features=(features,))
        count = len(self.start_ids)
        above = torch.ones(count, count, dtype=torch.bool).tril()
        visible = None if self.first_position is None else above
        hidden = self.feed(prefix, torch.tensor(self.start_ids), visible=visible)
        return replace(prefix, root=hidden[:, -1:], first_position=first + count, fed=0)

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


class GitDecoder(Decoder):
    """GIT: the image is a prefix of the text, held with the start tokens in the cache."""

    def __init__(self, model: Any, **rest: Any) -> None:
        super().__init__(model, model.get_output_embeddings(), **rest)

    def context(self, image: Tensor) -> tuple[int, int]:
        """Return the number of patches and start tokens in front of the prompt."""
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


class ProcessedDecoder(Decoder):
    """Captioners whose processor makes a model's inputs of each region and an instruction.

    Prepared regions are those inputs, mappings. `language_model` is what runs on prompt tokens;
    `pad_id` fills the token ids of shorter inputs on the left.
    """

    def __init__(
        self, model: Any, head: Any, language_model: Any, *, pad_id: int, **rest: Any
    ) -> None:
        super().__init__(model, head, **rest)
        self.language_model = language_model
        self.pad_id = pad_id

    def joins(self, first: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
        """Return whether two regions can be read together: those of one length."""
        return first["input_ids"].shape == image["input_ids"].shape

    @abstractmethod
    def asked(self, image: Mapping[str, Tensor], sequence: TokenIds) -> Mapping[str, Tensor]:
        """Return the inputs of one region, the start tokens and a prompt."""

    def reference(self, images: Sequence[Mapping[str, Tensor]], sequence: TokenIds) -> Tensor:
        """Return the sums (R,) of one full forward a region."""
        sums = []
        for image in images:
            inputs = self.moved(self.asked(image, sequence))
            logits = self.model(**inputs, use_cache=False).logits
            sums.append(sequence_log_likelihood(logits[:, -len(sequence) - 1 : -1], sequence))
        return torch.cat(sums)

    def moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs on the model's device."""
        return {name: to_device(value, self.model.device) for name, value in inputs.items()}


class PrefixDecoder(ProcessedDecoder):
    """Decoder-only captioners: image and instruction are tokens in front of the prompt.

    This one reads as LLaVA, LLaVA-OneVision and SmolVLM do: positions count from `first` over what
    is not padding, and the model itself runs behind its prefix.
    """

    first = 0
    prompt_type = 0  # token type of a prompt, for models that tell text from images by it
    pads = True  # whether prefixes of unequal length can be read together
    text_model = ""  # what of the model runs behind its prefix, "" for all

    def __init__(self, model: Any, **rest: Any) -> None:
        language_model = getattr(model, self.text_model) if self.text_model else model
        super().__init__(model, model.get_output_embeddings(), language_model, **rest)

    def prefix_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the position ids of a prefix; `mask` (R, L) is 0 for padding."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + self.first}

    def first_position(self, mask: Tensor) -> Tensor:
        """Return the position ids (R,) of the first prompt token, after the prefix is read."""
        return mask.sum(1) + self.first

    def position_ids(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the model's arguments for the positions (R, N) of prompt tokens."""
        return {"position_ids": positions}

    def joins(self, first: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
        """Return whether two regions can be read together: padded, or of one length."""
        # A batch of prompts has no mask for a prefix's padding.
        return super().joins(first, image) or (self.pads and self.by_trie)

    def taken(self, image: Mapping[str, Tensor]) -> int:
        """Return the tokens of image and instruction, and what the first position leaves out."""
        return self.first + len(image["input_ids"][0])

    def encode(self, images: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Read image and instruction of R regions."""
        regions = list(images)
        assert all(self.joins(regions[0], region) for region in regions[1:])
        inputs = self.moved(collate(regions, self.pad_id))
        mask = inputs["attention_mask"]
        padded = not bool(mask.all())
        positions = self.prefix_positions(mask) if padded else {}
        hidden, output = capture_hidden(
            self.head, lambda: self.model(**inputs, **positions, use_cache=True)
        )
        root = hidden[:, -1:]
        output = getattr(output, "language_model_outputs", output)
        return Prefix(
            output.past_key_values,
            root,
            self.first_position(mask).to(root.device),
            visible=mask.bool().to(root.device) if padded else None,
        )

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Run the language model behind the cached image and instruction."""
        return self.language_model(
            input_ids=tokens,
            past_key_values=prefix.cache,
            attention_mask=mask,
            use_cache=True,
            **self.position_ids(positions),
            **self.image_inputs(prefix, tokens),
        )

    def image_inputs(self, prefix: Prefix, tokens: Tensor) -> dict[str, Tensor]:
        """Return what the language model is told of the image again with every (R, N) tokens."""
        return {}

    def asked(self, image: Mapping[str, Tensor], sequence: TokenIds) -> Mapping[str, Tensor]:
        """Return image, instruction and prompt as one text."""
        return extended(image, torch.tensor([sequence]), self.prompt_type)


class PaliGemmaDecoder(PrefixDecoder):
    """PaliGemma: positions from 1; token types make image and instruction see each other."""

    first = 1
    prompt_type = 1

    def project(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) float32, squashed behind the head where Gemma 2 does so."""
        bound = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        logits = super().project(hidden)
        return logits if bound is None else (logits / bound).tanh() * bound


class QwenDecoder(PrefixDecoder):
    """Qwen-VL: three position ids a token, which an image's grid makes jump."""

    def prefix_positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return nothing: the model finds them from grid and padding mask."""
        return {}

    def first_position(self, mask: Tensor) -> Tensor:
        """Return the next position: an image takes fewer positions than it has tokens."""
        return mask.sum(1) + rope_deltas(self.model)[:, 0].to(mask.device)

    def position_ids(self, positions: Tensor) -> dict[str, Tensor]:
        """Return time, height and width, which are one number for text: (3, R, N)."""
        return {"position_ids": positions.expand(3, *positions.shape)}


class QFormerDecoder(PrefixDecoder):
    """BLIP-2 and InstructBLIP: the language model runs without the image's part."""

    pads = False  # a Q-Former's queries are as many for every image
    text_model = "language_model"


class CountingDecoder(PrefixDecoder):
    """A family of which nothing is known: it counts positions itself, for one region at a time."""

    def joins(self, first: Mapping[str, Tensor], image: Mapping[str, Tensor]) -> bool:
        """Return that no two regions are read together: what a model counts may be their own."""
        return False

    def position_ids(self, positions: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class MllamaDecoder(PrefixDecoder):
    """Llama 3.2 Vision: some layers attend to the image, whose keys lie in the text's cache."""

    pads = False

    def encode(self, images: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Read image and instruction, and keep which tiles the last token sees: (R, 1, 1, T)."""
        prefix = super().encode(images)
        tiles = torch.cat([image["cross_attention_mask"][:, -1:] for image in images])
        return replace(prefix, features=(tiles.to(prefix.root.device),))

    def image_inputs(self, prefix: Prefix, tokens: Tensor) -> dict[str, Tensor]:
        """Return that every token sees the tiles."""
        tiles = prefix.features[0].expand(-1, tokens.shape[1], -1, -1)
        return {"cross_attention_mask": tiles}

    def rewind(self, prefix: Prefix) -> None:
        """Forget the fed nodes in the layers that hold them; images' keys stay."""
        across = self.model.config.get_text_config().cross_attention_layers
        crop_text(prefix.cache, prefix.fed, across)
        prefix.fed = 0

    def asked(self, image: Mapping[str, Tensor], sequence: TokenIds) -> Mapping[str, Tensor]:
        """Return one text, with every token of the prompt seeing the tiles."""
        tiles = image["cross_attention_mask"]
        more = tiles[:, -1:].expand(-1, len(sequence), -1, -1)
        return {
            **super().asked(image, sequence),
            "cross_attention_mask": torch.cat([tiles, more], 1),
        }


class KosmosDecoder(PrefixDecoder):
    """Kosmos-2: the text model counts positions from its cache."""

    pads = False
    text_model = "text_model"

    def position_ids(self, positions: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


class SequenceToSequenceDecoder(ProcessedDecoder):
    """Captioners that read image and instruction with an encoder: BLIP-2 T5, Florence-2."""

    def __init__(self, model: Any, language_model: Any, **rest: Any) -> None:
        super().__init__(model, language_model.get_output_embeddings(), language_model, **rest)

    def context(self, image: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return the start tokens, and the encoder's."""
        return len(self.start_ids), len(image["input_ids"][0])

    def encode(self, images: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Run the encoder on image and instruction, and the decoder on the start tokens."""
        device = self.model.device
        inputs = self.moved(collate(list(images), self.pad_id))
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

    def asked(self, image: Mapping[str, Tensor], sequence: TokenIds) -> Mapping[str, Tensor]:
        """Return the encoder's inputs and the decoder's tokens."""
        return {**image, "decoder_input_ids": torch.tensor([[*self.start_ids, *sequence]])}


class Florence2Decoder(SequenceToSequenceDecoder):
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
    """Make a table of learned positions return those of `positions` (R, N) for any input.

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
