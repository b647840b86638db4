"""Tests of the detectors, on tiny random ones in the real on-disk format.

Every family is compared with the library's own processor and model, called image by image.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hts_ray.config import RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.regions import Detection
from hts_ray.store.aliases import Pixels
from hts_ray.teacher.detector import (
    FIXED,
    ZERO_SHOT,
    Detector,
    _grounding_text,
    _texts,
    _token_labels,
    check_detector,
    detector_fingerprint,
    detector_queries,
    load_detector,
)

OBJECTS = ("hot_dog", "horse")
QUERIES = ["person", "hot dog", "horse"]
LABELS = {0: "N/A", 1: "Person", 2: "Hot_Dog", 3: "horse"}
LAYERS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
POINTS = {"num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
SIDES = {"shortest_edge": 64, "longest_edge": 96}
NAMES = {"id2label": LABELS, "label2id": {name: key for key, name in LABELS.items()}}


@pytest.fixture(scope="session")
def images() -> list[Pixels]:
    rng = np.random.default_rng(0)
    sizes = [(50, 80), (90, 40), (50, 80), (64, 64)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def fill(model: Any) -> Any:
    """Give every parameter a number of its own: some are left unset, others near uniform."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def resnet(**more: Any) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], **more)


def swin() -> Any:
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )


def clip_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    end = "<|endoftext|>"
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["!", "<|startoftext|>", end],  # OWL takes a text that starts with 0 as none
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(["a photo of a person", "a hot dog", "a horse"], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=16, pad_token="!")


def bert_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    trained.train_from_iterator(["person. hot dog. horse. dining table."], trainer)
    return BertTokenizer(vocab=trained.get_vocab())


def save_detr(folder: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    backbone = resnet(out_features=["stage4"])
    config = DetrConfig(backbone_config=backbone, num_queries=7, **LAYERS, **NAMES)
    fill(DetrForObjectDetection(config)).save_pretrained(folder)
    DetrImageProcessor(size=SIDES).save_pretrained(folder)


def save_deformable(folder: Path) -> None:
    from transformers import (
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
    )

    backbone = resnet(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        backbone_config=backbone, num_queries=7, **POINTS, **LAYERS, **NAMES
    )
    fill(DeformableDetrForObjectDetection(config)).save_pretrained(folder)
    DeformableDetrImageProcessor(size=SIDES).save_pretrained(folder)


def save_yolos(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=7,
        **NAMES,
    )
    fill(YolosForObjectDetection(config)).save_pretrained(folder)
    YolosImageProcessor(size=SIDES).save_pretrained(folder)


def save_rt_detr(folder: Path) -> None:
    from transformers import (
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        RTDetrResNetConfig,
    )

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=7,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_n_points=2,
        num_denoising=0,
        **NAMES,
    )
    fill(RTDetrForObjectDetection(config)).save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def save_owl(folder: Path) -> None:
    import transformers

    name = "Owlv2" if folder.name == "owlv2" else "OwlViT"
    tokenizer = clip_tokenizer()
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    model = fill(getattr(transformers, f"{name}ForObjectDetection")(config))
    model.save_pretrained(folder)
    image_processor = getattr(transformers, f"{name}ImageProcessor")(
        size={"height": 32, "width": 32}
    )
    getattr(transformers, f"{name}Processor")(image_processor, tokenizer).save_pretrained(folder)


def save_grounding(folder: Path) -> None:
    import transformers

    name = "MMGroundingDino" if folder.name == "mm-grounding-dino" else "GroundingDino"
    tokenizer = bert_tokenizer()
    text = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = getattr(transformers, f"{name}Config")(
        backbone_config=swin(),
        text_config=text,
        num_queries=7,
        max_text_len=16,
        **POINTS,
        **LAYERS,
    )
    fill(getattr(transformers, f"{name}ForObjectDetection")(config)).save_pretrained(folder)
    image_processor = transformers.GroundingDinoImageProcessor(size=SIDES)
    transformers.GroundingDinoProcessor(image_processor, tokenizer).save_pretrained(folder)


def save_omdet(folder: Path) -> None:
    from transformers import (
        CLIPTextConfig,
        DetrImageProcessor,
        OmDetTurboConfig,
        OmDetTurboForObjectDetection,
        OmDetTurboProcessor,
    )

    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        projection_dim=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = OmDetTurboConfig(
        backbone_config=swin(),
        text_config=text,
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=48,
        text_projection_out_dim=48,
        class_embed_dim=48,
        task_encoder_hidden_dim=32,
        num_queries=7,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 64],
        vision_features_channels=[32, 32, 32],
        encoder_dim_feedforward=32,
        encoder_attention_heads=4,
        decoder_hidden_dim=32,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=32,
        decoder_num_points=2,
    )
    fill(OmDetTurboForObjectDetection(config)).save_pretrained(folder)
    image_processor = DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    OmDetTurboProcessor(image_processor, tokenizer).save_pretrained(folder)


SAVERS: dict[str, Callable[[Path], None]] = {
    "detr": save_detr,
    "deformable_detr": save_deformable,
    "yolos": save_yolos,
    "rt_detr": save_rt_detr,
    "owlvit": save_owl,
    "owlv2": save_owl,
    "grounding-dino": save_grounding,
    "mm-grounding-dino": save_grounding,
    "omdet-turbo": save_omdet,
}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny checkpoint, saved when it is first asked for."""
    root = tmp_path_factory.mktemp("detectors")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            SAVERS[family](path)
        return path

    return folder


def settings_of(folder: Path | str, **more: Any) -> RegionsConfig:
    return RegionsConfig(detector=str(folder), **{"detector_threshold": 0.0, **more})


def by_hand(folder: Path, image: Pixels, config: RegionsConfig) -> tuple[Any, Any, list[str]]:
    """Return scores, boxes and labels of the library's own calls on one image.

    Grounding DINO's labels are its phrases.
    """
    import torch
    import transformers
    from PIL import Image

    family = folder.name
    height, width, _ = image.shape
    picture = Image.fromarray(image)
    options = {"threshold": config.detector_threshold, "target_sizes": [(height, width)]}
    with torch.no_grad():
        if family in FIXED:
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
            model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
            outputs = model(**processor(images=picture, return_tensors="pt"))
            result = processor.post_process_object_detection(outputs, **options)[0]
            labels = [
                LABELS[label].lower().replace("_", " ") for label in result["labels"].tolist()
            ]
            return result["scores"], result["boxes"], labels
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
        texts = QUERIES
        if family.startswith("owl"):
            texts = ["a photo of a person", "a photo of a hot dog", "a photo of a horse"]
        inputs = processor(images=picture, text=[texts], return_tensors="pt")
        outputs = model(**inputs)
        if family == "omdet-turbo":
            options["nms_threshold"] = config.nms_iou
        if family.endswith("grounding-dino"):
            options["text_threshold"] = config.detector_threshold
            options["input_ids"] = inputs["input_ids"]
        else:
            options["text_labels"] = [QUERIES]
        result = processor.post_process_grounded_object_detection(outputs, **options)[0]
        return result["scores"], result["boxes"], list(result["text_labels"])


def assert_close(found: Sequence[Detection], other: Sequence[Detection]) -> None:
    assert [one.label for one in found] == [one.label for one in other]
    for one, two in zip(found, other, strict=True):
        assert one.box == pytest.approx(two.box, abs=2e-3)
        assert one.score == pytest.approx(two.score, abs=1e-5)
        assert one.is_person == two.is_person


@pytest.mark.parametrize("family", SAVERS)
def test_equals_the_library_image_by_image(
    family: str, folder_of: Callable[[str], Path], images: list[Pixels]
) -> None:
    """Catches boxes of another scale or image, wrong labels, and padding that changes results."""
    config = settings_of(folder_of(family), nms_iou=0.5)
    detector = load_detector(config, OBJECTS)
    batched = detector.detect(images)
    assert sum(map(len, batched)) > 3
    for image, found in zip(images, batched, strict=True):
        assert_close(found, detector.detect([image])[0])
        scores, boxes, labels = by_hand(folder_of(family), image, config)
        kept = [n for n, label in enumerate(labels) if label != "n/a"]
        assert len(found) == len(kept)
        np.testing.assert_allclose(
            np.array([one.box for one in found]).reshape(-1, 4), boxes.numpy()[kept], atol=2e-3
        )
        np.testing.assert_allclose([one.score for one in found], scores.numpy()[kept], atol=1e-5)
        for one, n in zip(found, kept, strict=True):
            assert one.is_person == (one.label == "person")
            if family.endswith("grounding-dino"):
                assert one.label in QUERIES
                assert set(one.label.split()) & set(labels[n].replace(".", " ").split())
            else:
                assert one.label == labels[n]
    assert detector.detect([]) == []


def test_threshold_is_the_least_score(
    folder_of: Callable[[str], Path], images: list[Pixels]
) -> None:
    """Catches a threshold that does not reach the post-processing."""
    folder = folder_of("deformable_detr")
    everything = load_detector(settings_of(folder), OBJECTS).detect(images[:1])[0]
    middle = sorted(one.score for one in everything)[len(everything) // 2]
    config = settings_of(folder, detector_threshold=middle)
    above = load_detector(config, OBJECTS).detect(images[:1])[0]
    assert above == [one for one in everything if one.score > middle]
    assert 0 < len(above) < len(everything)


def test_person_labels_are_the_settings(
    folder_of: Callable[[str], Path], images: list[Pixels]
) -> None:
    """Catches persons told by a fixed name instead of label.regions.person_labels."""
    config = settings_of(folder_of("deformable_detr"), person_labels=("Horse",))
    found = load_detector(config, ()).detect(images)
    assert {one.label for of_image in found for one in of_image if one.is_person} == {"horse"}


@pytest.mark.parametrize("family", ["detr", "owlv2", "grounding-dino"])
def test_half_precision_finds_the_same(
    family: str, folder_of: Callable[[str], Path], images: list[Pixels]
) -> None:
    """Catches inputs left at float32, and scores rounded to bfloat16 in the post-processing."""
    detector = load_detector(settings_of(folder_of(family)), OBJECTS, dtype="bfloat16")
    found = detector.detect(images[:1])[0]
    full = load_detector(settings_of(folder_of(family)), OBJECTS).detect(images[:1])[0]
    assert len(found) == len(full)
    best = max(one.score for one in full)
    assert max(one.score for one in found) == pytest.approx(best, abs=0.1)


def test_scores_that_are_no_numbers_are_an_error(
    folder_of: Callable[[str], Path], images: list[Pixels], tmp_path: Path
) -> None:
    """Catches a broken detector that looks like one which finds nothing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(folder_of("detr"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["class_labels_classifier.bias"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    detector = load_detector(settings_of(folder), OBJECTS)
    with pytest.raises(DataError, match="not numbers"):
        detector.detect(images[:1])


def test_long_label_lists_are_asked_in_parts(
    folder_of: Callable[[str], Path], images: list[Pixels]
) -> None:
    """Catches labels behind the length of Grounding DINO's text, which are never found."""
    folder = folder_of("grounding-dino")
    labels = ("hot dog", "horse", "dining table", "dog", "hot table", "hot horse", "table")
    detector = load_detector(settings_of(folder), labels)
    found = detector.detect(images[:2])
    texts = _texts(bert_tokenizer(), ["person", *labels], 16)
    assert len(texts) > 1
    assert [query for _, chunk in texts for query in chunk] == ["person", *labels]
    assert all(len(bert_tokenizer()(text).input_ids) <= 16 for text, _ in texts)
    assert [len(of_image) for of_image in found] == [7 * len(texts)] * 2
    for part, (_, chunk) in enumerate(texts):
        assert {one.label for one in found[0][7 * part : 7 * part + 7]} <= set(chunk)


def test_tokens_belong_to_their_label() -> None:
    """Catches a label shifted by the dots and special tokens around it."""
    tokenizer = bert_tokenizer()
    text = _grounding_text(QUERIES)
    owners = _token_labels(tokenizer, text).tolist()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokens[0] == "[CLS]"
    words: dict[int, str] = {}
    for token, owner in zip(tokens, owners, strict=True):
        if owner >= 0:
            words[owner] = words.get(owner, "") + token.removeprefix("##")
        else:
            assert token in {"[CLS]", "[SEP]", "."}
    assert words == {0: "person", 1: "hotdog", 2: "horse"}


def test_queries_of_zero_shot_detectors() -> None:
    """Catches queries without a person, with underscores, repeats or dots."""
    config = RegionsConfig(detector="x")
    assert detector_queries(config, ["hot_dog", "Person", "hot dog", "st. bernard", " "]) == [
        "person",
        "hot dog",
        "st bernard",
    ]
    asked = RegionsConfig(detector="x", detector_labels=("Man", "dog"))
    assert detector_queries(asked, ["horse"]) == ["man", "dog"]
    other = RegionsConfig(detector="x", person_labels=("human",))
    assert detector_queries(other, ["dog"]) == ["human", "dog"]
    wrong = RegionsConfig(detector="x", detector_labels=("dog",))
    with pytest.raises(ConfigError, match="no person") as caught:
        detector_queries(wrong, [])
    assert caught.value.field == "label.regions.detector_labels"


def test_families_are_the_library_s() -> None:
    """Catches a family that is promised and that transformers does not load."""
    from transformers.models.auto import modeling_auto

    assert set(FIXED) <= set(modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES)
    assert set(ZERO_SHOT) == set(modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES)


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _garbled_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]", encoding="utf-8")


def _only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _a_captioner(folder: Path) -> None:
    edit_settings(folder, model_type="blip")


def _no_persons(folder: Path) -> None:
    edit_settings(folder, id2label={str(n): f"breed_{n}" for n in range(20)})


def _no_labels(folder: Path) -> None:
    edit_settings(folder, id2label=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "no config.json"),
        (_garbled_config, "not readable"),
        (_list_config, "not an object"),
        (_only_pickled_weights, "no .safetensors"),
        (_a_captioner, "family 'blip' is no object detector"),
        (_no_persons, "finds no persons .*: its labels are breed 0, breed 1, .* and 8 more"),
        (_no_labels, "none that are named"),
    ],
)
def test_wrong_folders_are_refused_unloaded(
    damage: Callable[[Path], None],
    message: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Catches a detector that fails on every worker instead of before the run."""
    folder = tmp_path / "copy"
    shutil.copytree(folder_of("detr"), folder)
    check_detector(settings_of(folder))
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        check_detector(settings_of(folder))
    assert caught.value.field == "label.regions.detector"
    with pytest.raises(ConfigError, match=message):
        load_detector(settings_of(folder), OBJECTS)


@pytest.mark.parametrize("name", ["/nowhere/detr", "./nowhere", "no id!"])
def test_missing_folders_are_refused(name: str) -> None:
    """Catches a mistyped path that is taken for a hub id."""
    with pytest.raises(ConfigError, match="no such folder"):
        check_detector(settings_of(name))
    with pytest.raises(ConfigError, match="no such folder"):
        detector_fingerprint(settings_of(name))


def test_hub_out_of_reach_names_the_setting() -> None:
    """Catches a library's traceback for a model that cannot be downloaded."""
    config = settings_of("nobody/no-detector", detector_revision="abc")
    check_detector(config)
    with pytest.raises(ConfigError, match="not to be had from the hub") as caught:
        load_detector(config, OBJECTS)
    assert caught.value.field == "label.regions.detector"


def test_missing_weights_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches random numbers in place of weights that a file lacks."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    shutil.copytree(folder_of("yolos"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["class_labels_classifier.layers.0.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights, e.g. class_labels_classifier"):
        load_detector(settings_of(folder), OBJECTS)


def test_damaged_weights_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches a half-copied file that ends in a library's traceback."""
    folder = tmp_path / "half"
    shutil.copytree(folder_of("yolos"), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="does not load") as caught:
        load_detector(settings_of(folder), OBJECTS)
    assert caught.value.field == "label.regions.detector"


def test_timm_backbones_of_older_models_load_without_network(
    tmp_path: Path, images: list[Pixels]
) -> None:
    """Catches a local DETR saved by transformers 4 that asks the hub for its backbone's name."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    old = {"use_timm_backbone": True, "backbone": "resnet10t"}
    model = fill(DetrForObjectDetection(DetrConfig(**old, num_queries=7, **LAYERS, **NAMES)))
    model.save_pretrained(tmp_path)
    DetrImageProcessor(size=SIDES).save_pretrained(tmp_path)
    saved = load_detector(settings_of(tmp_path), OBJECTS).detect(images[:1])
    kwargs = {"in_chans": 3, "out_indices": [1, 2, 3, 4]}
    edit_settings(
        tmp_path,
        **old,
        backbone_config=None,
        backbone_kwargs=kwargs,
        use_pretrained_backbone=True,
    )
    assert_close(load_detector(settings_of(tmp_path), OBJECTS).detect(images[:1])[0], saved[0])


def test_fingerprint_follows_the_model(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches another detector's boxes being taken for this one's."""
    folder = tmp_path / "detr"
    shutil.copytree(folder_of("detr"), folder)
    first = detector_fingerprint(settings_of(folder))
    assert first == detector_fingerprint(settings_of(folder_of("detr")))
    edit_settings(folder, id2label={"0": "person"})
    assert detector_fingerprint(settings_of(folder)) != first
    pinned = settings_of("org/name", detector_revision="abc")
    assert detector_fingerprint(pinned) == "org/name@abc"
    assert detector_fingerprint(settings_of("org/name")) == "org/name@main"
    assert detector_fingerprint(RegionsConfig()) == ""


def test_is_a_detector(folder_of: Callable[[str], Path]) -> None:
    """Catches a loader that no longer fits the protocol the scorer is written for."""
    detector: Detector = load_detector(settings_of(folder_of("detr")), OBJECTS)
    assert callable(detector.detect)
