"""Tiny captioners of every supported family, saved in their real on-disk format.

Weights are moved away from their near-uniform start: there, wrong scores look right. Image
processors keep what matters of the real ones: anyres and tiled families see several grids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = [
    f"a person {verb} a {noun}"
    for verb in ("riding", "holding", "washing", "sitting on")
    for noun in ("bicycle", "horse", "hot dog", "dog", "bicycle wheel")
]
# What instructions are made of, so that their tokens are words too.
TRAINING_TEXTS = [
    *TEXTS,
    "Describe the image in one sentence.",
    "a photo of",
    "An image of",
    *["yes", "no", "Yes", "No", "Answer yes or no. Does this image show a person?"] * 8,
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}


def perturb(model: Any, seed: int = 0) -> None:
    """Move weights away from their near-uniform start."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))


def word_pieces() -> Any:
    """Train BERT's kind of tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    return BertTokenizer(vocab=trained.get_vocab())


def byte_pieces(special: list[str]) -> tuple[Any, Any]:
    """Return vocabulary and merges of a byte-level BPE, as GPT-2's, BART's and Qwen's."""
    from tokenizers import pre_tokenizers

    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained_bpe(before, special, pre_tokenizers.ByteLevel.alphabet())


def space_pieces(special: list[str]) -> tuple[Any, Any]:
    """Return vocabulary and merges of a BPE with spaces as letters, as Llama's and Gemma's."""
    from tokenizers import pre_tokenizers

    alphabet = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *":.<>", "\n", "▁"]
    return _trained_bpe(pre_tokenizers.Metaspace(), special, alphabet)


def _trained_bpe(before: Any, special: list[str], alphabet: list[str]) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = before
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TRAINING_TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def unigram_pieces(special: list[str]) -> list[tuple[str, float]]:
    """Return the scored pieces of a Unigram tokenizer, as T5's and XLM-R's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(TRAINING_TEXTS, trainer)
    pieces = dict(json.loads(trained.to_str())["model"]["vocab"])
    answers = {f"▁{word}": -2.0 for word in ("yes", "no", "Yes", "No")}
    return [*(pieces | answers).items()]


def _saved(folder: Path, model: Any, processor: Any) -> Path:
    perturb(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    """Save a BLIP, stored as float16 like the packaged one."""
    import torch
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = word_pieces()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    text = {
        **SMALL,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = BlipForConditionalGeneration(
        BlipConfig(
            vision_config=VISION, text_config=text, image_text_hidden_size=32, projection_dim=32
        )
    )
    perturb(model)
    model.to(torch.float16).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    """Save a GIT."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = word_pieces()
    model = GitForCausalLM(
        GitConfig(
            vision_config=VISION,
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SMALL,
        )
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    return _saved(folder, model, GitProcessor(pixels, tokenizer))


def encoder_decoder(folder: Path, decoder_config: Any, tokenizer: Any) -> Path:
    """Save a ViT with any text decoder as a VisionEncoderDecoder."""
    from transformers import (
        AutoModelForCausalLM,
        TrOCRProcessor,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    decoder_config.is_decoder = decoder_config.add_cross_attention = True
    encoder = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    model = VisionEncoderDecoderModel(
        encoder=encoder, decoder=AutoModelForCausalLM.from_config(decoder_config)
    )
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.eos_token_id = tokenizer.sep_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return _saved(folder, model, TrOCRProcessor(ViTImageProcessor(size=SIZE), tokenizer))


def vit_bert(folder: Path) -> Path:
    """Save a VisionEncoderDecoder of ViT and BERT."""
    from transformers import BertConfig

    tokenizer = word_pieces()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL)
    return encoder_decoder(folder, config, tokenizer)


def vit_trocr(folder: Path) -> Path:
    """Save a VisionEncoderDecoder of ViT and TrOCR's decoder."""
    from transformers import TrOCRConfig

    tokenizer = word_pieces()
    config = TrOCRConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        cross_attention_hidden_size=32,
    )
    return encoder_decoder(folder, config, tokenizer)


QFORMER = {**SMALL, "encoder_hidden_size": 32, "cross_attention_frequency": 1}


def _opt_text(tokenizer: Any) -> Any:
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_text(tokenizer: Any, *, tied: bool) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        initializer_factor=0.5,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def _llama_text(vocabulary: int, **settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        **SMALL,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings},
    )


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = unigram_pieces(["<pad>", "</s>", "<unk>"])
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _llama_tokenizer(extra: dict[str, str] | None = None) -> Any:
    from transformers import LlamaTokenizer

    vocabulary, merges = space_pieces(["<unk>", "<s>", "</s>", *(extra or {}).values()])
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=merges, pad_token="<unk>", extra_special_tokens=extra or {}
    )
    tokenizer.add_bos_token = True
    return tokenizer


def _blip2(folder: Path, tokenizer: Any, text: Any) -> Path:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
    )

    processor = Blip2Processor(BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=4)
    text.vocab_size = len(tokenizer)
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=VISION,
            num_query_tokens=4,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            qformer_config=QFORMER,
            text_config=text.to_dict(),
        )
    )
    return _saved(folder, model, processor)


def blip2_opt(folder: Path) -> Path:
    """Save a BLIP-2 with OPT, whose captions end with a line break as the real ones do."""
    from transformers import GPT2Tokenizer

    vocabulary, merges = byte_pieces(["<pad>", "</s>"])
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", **special)
    text = _opt_text(tokenizer)
    text.eos_token_id = tokenizer("\n").input_ids[-1]
    return _blip2(folder, tokenizer, text)


def blip2_t5(folder: Path) -> Path:
    """Save a BLIP-2 with T5."""
    tokenizer = _t5_tokenizer()
    return _blip2(folder, tokenizer, _t5_text(tokenizer, tied=False))


def _instructblip(folder: Path, tokenizer: Any, text: Any) -> Path:
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    qformer_tokenizer = word_pieces()
    processor = InstructBlipProcessor(
        BlipImageProcessor(size=SIZE), tokenizer, qformer_tokenizer, num_query_tokens=4
    )
    text.vocab_size = len(tokenizer)
    model = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=VISION,
            num_query_tokens=4,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            qformer_config={**QFORMER, "vocab_size": len(qformer_tokenizer)},
            text_config=text.to_dict(),
        )
    )
    return _saved(folder, model, processor)


def instructblip_vicuna(folder: Path) -> Path:
    """Save an InstructBLIP with a LLaMA."""
    tokenizer = _llama_tokenizer()
    return _instructblip(folder, tokenizer, _llama_text(len(tokenizer)))


def instructblip_t5(folder: Path) -> Path:
    """Save an InstructBLIP with T5, whose hidden states are scaled in front of the head."""
    tokenizer = _t5_tokenizer()
    return _instructblip(folder, tokenizer, _t5_text(tokenizer, tied=True))


def florence2(folder: Path) -> Path:
    """Save a Florence-2."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        RobertaTokenizer,
    )

    vocabulary, merges = byte_pieces(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"])
    tokenizer = RobertaTokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens={"image_token": "<image>"}
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=None,
    )
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (16, 32),
        "num_heads": (2, 4),
        "num_groups": (2, 4),
        "window_size": 4,
        "projection_dim": 32,
        "max_position_embeddings": 10,
        "max_temporal_embeddings": 10,
    }
    config = Florence2Config(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pixels = CLIPImageProcessor(size=SIZE, do_center_crop=False)
    pixels.image_seq_length = 17  # 4 x 4 and their mean
    processor = Florence2Processor(pixels, tokenizer)
    return _saved(folder, Florence2ForConditionalGeneration(config), processor)


def _paligemma(folder: Path, text: dict[str, Any]) -> Path:
    from transformers import (
        GemmaTokenizer,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary, merges = space_pieces(special)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    pixels = SiglipImageProcessor(size=SIZE)
    pixels.image_seq_length = 16
    processor = PaliGemmaProcessor(pixels, tokenizer)
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            text_config={
                **SMALL,
                "vocab_size": len(tokenizer),
                "num_key_value_heads": 1,
                "head_dim": 8,
                "bos_token_id": 2,
                "eos_token_id": 1,
                "pad_token_id": 0,
                **text,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            projection_dim=32,
            hidden_size=32,
        )
    )
    return _saved(folder, model, processor)


def paligemma(folder: Path) -> Path:
    """Save a PaliGemma."""
    return _paligemma(folder, {"model_type": "gemma"})


def paligemma2(folder: Path) -> Path:
    """Save a PaliGemma 2: a sliding window shorter than the prefix, and squashed logits."""
    gemma2 = {
        "model_type": "gemma2",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 50.0,
        "query_pre_attn_scalar": 8,
    }
    return _paligemma(folder, gemma2)


LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _llava(folder: Path, text: Callable[[int], Any], template: str | None) -> Path:
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _llama_tokenizer({"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
            text_config=text(len(tokenizer)).to_dict(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-2,
        )
    )
    return _saved(folder, model, processor)


def llava(folder: Path) -> Path:
    """Save a LLaVA with a LLaMA."""
    return _llava(folder, _llama_text, LLAVA_TEMPLATE)


def llava_sliding(folder: Path) -> Path:
    """Save a LLaVA without chat template, with a Mistral of a window shorter than the prefix."""
    from transformers import MistralConfig

    def text(vocabulary: int) -> Any:
        return MistralConfig(
            vocab_size=vocabulary,
            **SMALL,
            num_key_value_heads=2,
            sliding_window=24,
            pad_token_id=0,
        )

    return _llava(folder, text, None)


QWEN_SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{% for c in m['content'] %}"
    "{% if c['type']=='image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{c['text']}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role'] + ' '}}"
    "{% for c in m['content'] %}{% if c['type']=='image' %}<image>{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type']=='text' %}"
    "{{'\\n' + c['text']}}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer(special: list[str]) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = byte_pieces(["<|endoftext|>", *special])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def llava_onevision(folder: Path) -> Path:
    """Save a LLaVA-OneVision: anyres tiles, with Qwen2."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = _qwen_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=SIZE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    ids = tokenizer.convert_tokens_to_ids
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            text_config={
                "model_type": "qwen2",
                **SMALL,
                "vocab_size": len(tokenizer),
                "num_key_value_heads": 2,
                "eos_token_id": ids("<|im_end|>"),
            },
            image_token_index=ids("<image>"),
            video_token_index=ids("<video>"),
            image_grid_pinpoints=pinpoints,
        )
    )
    return _saved(folder, model, processor)


SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOL_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
    *[f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)],
]


def _smol_tokenizer() -> Any:
    from transformers import GPT2Tokenizer

    vocabulary, merges = byte_pieces(SMOL_SPECIAL)
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        unk_token="<|endoftext|>",
        pad_token="<|im_start|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SMOL_SPECIAL[2:]})
    return tokenizer


def _smol_text(tokenizer: Any) -> dict[str, Any]:
    eos = tokenizer.eos_token_id
    text: dict[str, Any] = _llama_text(len(tokenizer), eos_token_id=eos).to_dict()
    return text


def smolvlm(folder: Path) -> Path:
    """Save a SmolVLM, which cuts images into tiles."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = _smol_tokenizer()
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        SmolVLMVideoProcessor(
            size={"longest_edge": 64},
            max_image_size={"longest_edge": 32},
            video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 64}},
        ),
        image_seq_len=4,
        chat_template=SMOL_TEMPLATE,
    )
    model = SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            vision_config=VISION,
            text_config=_smol_text(tokenizer),
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _saved(folder, model, processor)


def idefics3(folder: Path) -> Path:
    """Save an Idefics3, which cuts images into tiles."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = _smol_tokenizer()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=SMOL_TEMPLATE,
    )
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=VISION,
            text_config=_smol_text(tokenizer),
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _saved(folder, model, processor)


def _qwen(folder: Path, prefix: str, vision: dict[str, Any], **text: Any) -> Path:
    import transformers
    from transformers import Qwen2VLImageProcessor

    tokenizer = _qwen_tokenizer(QWEN_SPECIAL)
    ids = tokenizer.convert_tokens_to_ids
    config = getattr(transformers, f"{prefix}Config")(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        text_config={
            **SMALL,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            **vision,
        },
    )
    area = {"min_pixels": 1024, "max_pixels": 4096}
    video = getattr(transformers, f"{prefix.replace('2_5_', '2')}VideoProcessor", None)
    video = video or transformers.Qwen2VLVideoProcessor
    # Later models share the processor of Qwen3-VL.
    named = getattr(transformers, f"{prefix}Processor", transformers.Qwen3VLProcessor)
    processor = named(
        image_processor=Qwen2VLImageProcessor(patch_size=8, merge_size=2, **area),
        tokenizer=tokenizer,
        video_processor=video(patch_size=8, merge_size=2),
        chat_template=QWEN_TEMPLATE,
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    return _saved(folder, model, processor)


def qwen2_vl(folder: Path) -> Path:
    """Save a Qwen2-VL."""
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen(folder, "Qwen2VL", vision)


def qwen2_5_vl(folder: Path) -> Path:
    """Save a Qwen2.5-VL."""
    vision = {
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return _qwen(folder, "Qwen2_5_VL", vision)


def answering(folder: Path) -> Path:
    """Save a Qwen2.5-VL that answers with yes or no, with heads of a size that vLLM takes.

    One number of the hidden state is the same behind every token; by it the head prefers answers.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    vision = {
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    text = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    _qwen(folder, "Qwen2_5_VL", vision, rope_parameters=rope, max_position_embeddings=512, **text)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    words = [f"{space}{word}" for word in ("yes", "no", "Yes", "No") for space in ("", " ")]
    written = AutoTokenizer.from_pretrained(folder)(words).input_ids
    answers = [ids[0] for ids in written if len(ids) == 1]
    for name, weight in model.named_parameters():
        if "language_model.layers" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data[0] = 0
    model.get_input_embeddings().weight.data[:, 0] = 4
    model.lm_head.weight.data[:, 0] = 0
    model.lm_head.weight.data[answers, 0] = 4
    model.save_pretrained(folder)
    return folder


def qwen3_vl(folder: Path) -> Path:
    """Save a Qwen3-VL."""
    vision = {
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(folder, "Qwen3VL", vision, head_dim=8)


def _vision_chat(folder: Path, model: str, config: Any, processor: Any) -> Path:
    import transformers

    return _saved(
        folder, getattr(transformers, f"{model}ForConditionalGeneration")(config), processor
    )


def llava_next(folder: Path) -> Path:
    """Save a LLaVA-NeXT: anyres tiles, with a LLaMA."""
    from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = _llama_tokenizer({"image_token": "<image>"})
    pinpoints = [[32, 64], [64, 32], [64, 64], [32, 96]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        text_config=_llama_text(len(tokenizer)).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    return _vision_chat(folder, "LlavaNext", config, processor)


INTERN_SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
INTERN_TEMPLATE = QWEN_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
)


def internvl(folder: Path) -> Path:
    """Save an InternVL, which cuts images into tiles, with Qwen2."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Tokenizer,
    )

    special = ["<|im_start|>", "<|im_end|>", *INTERN_SPECIAL.values()]
    vocabulary, merges = byte_pieces(["<|endoftext|>", *special])
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", extra_special_tokens=INTERN_SPECIAL
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SIZE, max_patches=3),
        tokenizer,
        InternVLVideoProcessor(size=SIZE),
        image_seq_length=4,
        chat_template=INTERN_TEMPLATE,
    )
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={
            "model_type": "qwen2",
            **SMALL,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return _vision_chat(folder, "InternVL", config, processor)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant'"
    " else m['role'] %}<start_of_turn>{{ role }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def gemma3(folder: Path) -> Path:
    """Save a Gemma 3: a sliding window shorter than the prefix, and an image that sees itself."""
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, GemmaTokenizer

    special = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    turns = ["<start_of_turn>", "<end_of_turn>"]
    vocabulary, merges = space_pieces(
        ["<pad>", "<eos>", "<bos>", "<unk>", *special.values(), *turns]
    )
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=special)
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    ids = tokenizer.convert_tokens_to_ids
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=SIZE),
        tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={
            **SMALL,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "bos_token_id": 2,
            "eos_token_id": ids("<end_of_turn>"),
            "pad_token_id": 0,
        },
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )
    return _vision_chat(folder, "Gemma3", config, processor)


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}[/INST]{% else %}{{ m['content'][0]['text'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


def mistral3(folder: Path) -> Path:
    """Save a Mistral 3: an image's shape is its tokens' grid."""
    from transformers import (
        LlamaTokenizer,
        Mistral3Config,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    marks = ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    vocabulary, merges = space_pieces(["<unk>", "<s>", "</s>", *marks])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_bos_token = True
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 64}, patch_size=8),
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 64, "head_dim": 8},
        text_config={
            "model_type": "mistral",
            **SMALL,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": None,
            "pad_token_id": 0,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return _vision_chat(folder, "Mistral3", config, processor)


LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def mllama(folder: Path) -> Path:
    """Save an mllama: every other layer attends to the image, whose keys share the text's cache."""
    from transformers import GPT2Tokenizer, MllamaConfig, MllamaImageProcessor, MllamaProcessor

    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|image|>", "<|python_tag|>"]
    vocabulary, merges = byte_pieces(["<|begin_of_text|>", "<|eot_id|>", "<pad>", *marks])
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        unk_token="<pad>",
        pad_token="<pad>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    ids = tokenizer.convert_tokens_to_ids
    processor = MllamaProcessor(
        MllamaImageProcessor(size=SIZE, max_image_tiles=4), tokenizer, chat_template=LLAMA_TEMPLATE
    )
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
        },
        text_config={
            **SMALL,
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer) - 1,  # the image's token is read and never written
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=ids("<|image|>"),
    )
    return _vision_chat(folder, "Mllama", config, processor)


def qwen3_vl_moe(folder: Path) -> Path:
    """Save a Qwen3-VL whose layers pick two of four experts a token."""
    vision = {
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _qwen(folder, "Qwen3VLMoe", vision, head_dim=8, **experts)


def qwen3_5(folder: Path) -> Path:
    """Save a Qwen3.5, of layers with and without a recurrent state."""
    vision = {"intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64}
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    return _qwen(folder, "Qwen3_5", vision, head_dim=16, **linear)


def kosmos2(folder: Path) -> Path:
    """Save a Kosmos-2."""
    from transformers import (
        CLIPImageProcessor,
        Kosmos2Config,
        Kosmos2ForConditionalGeneration,
        Kosmos2Processor,
        XLMRobertaTokenizer,
    )

    pieces = unigram_pieces(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = XLMRobertaTokenizer(vocab=pieces)
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = Kosmos2Processor(pixels, tokenizer, num_patch_index_tokens=16)
    text = {
        "vocab_size": len(tokenizer) + 64,  # an image's placeholders are 64 ids in a row
        "max_position_embeddings": 256,
        "embed_dim": 32,
        "layers": 2,
        "ffn_dim": 64,
        "attention_heads": 4,
        "dropout": 0.0,
    }
    config = Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=64)
    return _saved(folder, Kosmos2ForConditionalGeneration(config), processor)


def _seeded(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def seeded(folder: Path) -> Path:
        import torch

        torch.manual_seed(0)
        return build(folder)

    return seeded


BUILDERS: dict[str, Callable[[Path], Path]] = {
    build.__name__: _seeded(build)
    for build in (
        blip,
        git,
        vit_bert,
        vit_trocr,
        blip2_opt,
        blip2_t5,
        instructblip_vicuna,
        instructblip_t5,
        florence2,
        paligemma,
        paligemma2,
        llava,
        llava_sliding,
        llava_onevision,
        smolvlm,
        idefics3,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        llava_next,
        internvl,
        gemma3,
        mistral3,
        mllama,
        qwen3_vl_moe,
        qwen3_5,
        kosmos2,
    )
}
