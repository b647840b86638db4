"""Compare the teacher pass through Ray Data with a bare loop of the same model.

    python benchmarks/pipeline_efficiency.py [--images 120] [--rounds 3]

`bare` scores prepared tensors that lie in memory, in one process: what the model itself takes.
`pipeline` is `hts label` with one actor over JPEG files: reading, decoding, cropping, resizing,
checkpoints and Parquet included. A BLIP of 6 + 6 layers and width 256 at 224 pixels with random
weights, 600 prompts, 5 regions an image, one thread each, float32. Regions/s of the pipeline count
between its first and its last committed block, when everything is up; `whole` also counts the start
of Ray's workers and the loading of the model. Bare and pipeline run in turn.

`captions` compares greedy captions through `TransformersCaptioner.caption` with
`transformers.pipeline("image-to-text")`, today "image-text-to-text", over the same files,
images/s in one process. JSON goes to benchmarks/results/pipeline_efficiency.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measured import measured_on, write_results
from PIL import Image

from hts_ray.classes import ClassTable, hico_classes
from hts_ray.config import CaptionConfig, LabelConfig, RayConfig
from hts_ray.engine import compaction
from hts_ray.engine.compaction import BLOCKS
from hts_ray.engine.decoding import decode_batch, decoded_image
from hts_ray.engine.session import ray_cluster
from hts_ray.images.crops import CropBatch
from hts_ray.images.manifest import open_manifest
from hts_ray.images.regions import propose_regions
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.stage import label_images

RESULTS = Path(__file__).parent / "results" / "pipeline_efficiency.json"


def save_model(folder: Path, class_table: ClassTable) -> None:
    """Write a BLIP of a size that keeps one core busy for a tenth of a second a region."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(class_table.primary_prompts, trainer)
    tokenizer = BertTokenizer(vocab=trained.get_vocab())
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    text = {
        **size,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 256,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**size, "num_attention_heads": 4, "image_size": 224, "patch_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=256)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 224, "width": 224})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)


def save_images(folder: Path, count: int) -> tuple[str, list[str]]:
    """Write smooth noise as JPEG files of 640 x 480 pixels, and a manifest."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
    rows = [{"image_id": Path(p).stem, "uri": p, "split": "train"} for p in paths]
    manifest = str(folder / "manifest.parquet")
    write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return manifest, paths


def settings(model: Path) -> LabelConfig:
    """Return one actor, one thread, five regions an image."""
    return LabelConfig.model_validate(
        {
            "teacher": {"model": str(model), "prior": "none"},
            "regions": {"grid_scales": [0.6], "grid_steps": [2]},
            "batch_images": 4,
            "block_rows": 4,
        }
    )


def bare_rate(captioner: Any, config: LabelConfig, uris: list[str], prompts: list[str]) -> float:
    """Return regions/s of the model on tensors that are prepared beforehand."""
    table = pa.table({"image_id": uris, "uri": uris})
    decoded = decode_batch(table, config.images)
    images = [decoded_image(decoded, row) for row in range(len(uris))]
    regions = [propose_regions(i.width, i.height, config.regions) for i in images]
    sequences = captioner.tokenize(prompts)
    size = config.batch_images
    batches = [
        captioner.prepare(CropBatch.of(images[a : a + size], regions[a : a + size]))
        for a in range(0, len(images), size)
    ]
    count = 0
    with torch.inference_mode():
        started = time.monotonic()
        for batch in batches:
            count += len(captioner.decoder.log_likelihoods(batch, sequences))
        return count / (time.monotonic() - started)


def pipeline_rate(
    config: LabelConfig, manifest: str, class_table: ClassTable, folder: Path
) -> tuple[float, float]:
    """Return regions/s through Ray Data: between commits, and of the whole call."""
    stage = StageFolder(str(folder), "region_scores", str(time.time_ns()))
    compaction.MERGED_BYTES = 1  # the blocks stay, whose times are looked at
    started = time.monotonic()
    stats = label_images(
        config, manifest=open_manifest(manifest), class_table=class_table, stage=stage
    )
    wall = time.monotonic() - started
    times = sorted(path.stat().st_mtime for path in Path(stage.file(BLOCKS)).glob("*.parquet"))
    share = (len(times) - 1) / len(times)
    return stats["regions"] * share / (times[-1] - times[0]), stats["regions"] / wall


def caption_rates(captioner: Any, model: Path, uris: list[str]) -> dict[str, float]:
    """Return images/s of greedy captions, ours and transformers' own pipeline."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    theirs = pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(model),
        processor=AutoProcessor.from_pretrained(model),
        device="cpu",
    )
    greedy = CaptionConfig(max_tokens=20)
    # Both write 20 tokens: ours never meets the end with these weights, theirs must not either.
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    rates: dict[str, list[float]] = {"ours": [], "transformers_pipeline": []}
    for _ in range(3):
        started = time.monotonic()
        for first in range(0, len(uris), 8):
            names = uris[first : first + 8]
            decoded = decode_batch(
                pa.table({"image_id": names, "uri": names}), settings(model).images
            )
            images = [decoded_image(decoded, row).pixels for row in range(len(names))]
            captioner.caption(images, greedy)
        rates["ours"].append(len(uris) / (time.monotonic() - started))
        started = time.monotonic()
        for _output in theirs(
            images=uris, text=[""] * len(uris), batch_size=8, generate_kwargs=options
        ):
            pass
        rates["transformers_pipeline"].append(len(uris) / (time.monotonic() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Print and store the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    class_table = hico_classes()
    rounds = []
    with tempfile.TemporaryDirectory() as name, ray_cluster(RayConfig()):
        folder = Path(name)
        save_model(folder / "model", class_table)
        manifest, uris = save_images(folder, options.images)
        config = settings(folder / "model")
        captioner = load_captioner(config.teacher)
        print("round   bare regions/s   pipeline   efficiency   whole call")
        for number in range(options.rounds):
            bare = bare_rate(captioner, config, uris[: options.images // 3], prompts(class_table))
            steady, whole = pipeline_rate(config, manifest, class_table, folder)
            again = bare_rate(captioner, config, uris[: options.images // 3], prompts(class_table))
            bare = (bare + again) / 2
            rounds.append({"bare": bare, "pipeline": steady, "whole": whole})
            print(
                f"{number:5d} {bare:16.2f} {steady:10.2f} {steady / bare:12.3f}"
                f" {whole / bare:12.3f}",
                flush=True,
            )
        captions = caption_rates(captioner, folder / "model", uris[:48])
    efficiency = statistics.median(row["pipeline"] / row["bare"] for row in rounds)
    print(f"median efficiency {efficiency:.3f}; captions images/s {captions}")
    chosen = {key: value for key, value in vars(options).items() if key != "out"}
    report = {
        **measured_on(),
        "settings": {**chosen, "threads": 1, "prompts": len(class_table), "regions_per_image": 5},
        "efficiency": efficiency,
        "captions_images_per_second": captions,
        "rounds": rounds,
    }
    write_results(options.out, report)


def prompts(class_table: ClassTable) -> list[str]:
    """Return what both score."""
    return class_table.primary_prompts


if __name__ == "__main__":
    main()
