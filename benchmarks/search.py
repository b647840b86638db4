"""Time the search for a region's best classes against scoring every class.

    nice -n 10 python benchmarks/search.py [--regions 16] [--checked 160] [--rounds 5]

The packaged captioner looks at regions of drawn scenes (a validation world's), with the demo's 55
classes, with all of HICO's 600, and with 600 and the end of the sentence scored too; its
vocabulary knows every word of them. Two more models show what to expect of a larger one. `size`
has the shape of BLIP base and random weights but answers as the packaged captioner does: both
read everything, one's hidden states are used, and the vocabulary is the large one's. `undecided`
is BLIP base with random weights alone, which prefers no class, so that nothing can be left out:
the worst case.

Ratios are of process CPU seconds on one thread, images encoded anew in every row, in rounds that
visit the rows in turn; the median of the rounds is given. `decoding` is the ratio without the
seconds of encoding. Nodes are those of the prompt tree that
a region feeds, over those that scoring everything feeds. The table goes to stdout, the same
numbers with hardware, versions, settings and date to benchmarks/results/search.json.

Shapes: R regions, C classes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measured import measured_on, write_results
from torch import Tensor, nn

from hts_ray.classes import ClassTable, hico_classes, load_class_table
from hts_ray.config import TeacherConfig, load_config
from hts_ray.demo.world import TEST_EXPONENT, render_scene, sample_scene, world_class_ids
from hts_ray.images.crops import CropBatch
from hts_ray.images.decode import DecodedImage
from hts_ray.images.regions import propose_regions
from hts_ray.store.aliases import FloatArray, Pixels
from hts_ray.teacher.captioner import TopSearch
from hts_ray.teacher.models.architectures import CrossAttentionDecoder
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.models.pretrained import TransformersCaptioner
from hts_ray.teacher.scoring.decoders import Decoder, Prefix
from hts_ray.teacher.scoring.top_k import score_top
from hts_ray.teacher.scoring.trie import TokenIds

RESULTS = Path(__file__).parent / "results" / "search.json"
WORLD = 101  # a validation world: those from 100 on are for choosing and measuring settings
TOP_K = (10, 30)
BLIP_PIXELS = 384
BLIP_VOCABULARY = 30524


class TwinHead(nn.Module):
    """The vocabulary projection of `size`, whose first logits are then those of `answers`."""

    def __init__(self, answers: nn.Module, size: nn.Module, width: int) -> None:
        super().__init__()
        self.answers, self.size, self.width = answers, size, width
        self.out_features = BLIP_VOCABULARY

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V) of both models' hidden states, one behind the other."""
        answers = self.answers(hidden[..., : self.width])
        logits: Tensor = self.size(hidden[..., self.width :])
        logits.fill_(-1e4)
        logits[..., : answers.shape[-1]] = answers
        return logits


@dataclass
class TwinCache:
    """The caches of both models, under names that `select_regions` knows."""

    self_attention_cache: Any
    cross_attention_cache: Any
    is_updated: dict[int, bool] = field(default_factory=dict)

    def get_seq_length(self) -> int:
        """Return what both have read."""
        return int(self.self_attention_cache.get_seq_length())


class TwinDecoder(Decoder):
    """Costs what `size` costs and says what `answers` says; images are pairs for the two."""

    def __init__(self, answers: Decoder, size: Decoder, width: int) -> None:
        head = TwinHead(answers.head, size.head, width)
        super().__init__(None, head, end_ids=answers.end_ids)
        self.both = (answers, size)

    def encode(self, images: Any) -> Prefix:
        """Let both read R pairs."""
        one, other = (
            decoder.encode(torch.stack(pixels))
            for decoder, pixels in zip(self.both, zip(*images, strict=True), strict=True)
        )
        return Prefix(
            TwinCache(one.cache, other.cache),
            torch.cat([one.root, other.root], dim=-1),
            one.first_position,
            features=(*one.features, *other.features),
        )

    def _apart(self, prefix: Prefix) -> list[Prefix]:
        caches = (prefix.cache.self_attention_cache, prefix.cache.cross_attention_cache)
        return [
            Prefix(cache, prefix.root, prefix.first_position, None, (features,), prefix.fed)
            for cache, features in zip(caches, prefix.features, strict=True)
        ]

    def feed(
        self,
        prefix: Prefix,
        tokens: Tensor,
        depths: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Feed both and return their hidden states side by side."""
        hidden = [
            decoder.feed(own, tokens, depths, visible)
            for decoder, own in zip(self.both, self._apart(prefix), strict=True)
        ]
        prefix.fed += tokens.shape[-1]
        return torch.cat(hidden, dim=-1)

    def rewind(self, prefix: Prefix) -> None:
        """Rewind both."""
        for decoder, own in zip(self.both, self._apart(prefix), strict=True):
            decoder.rewind(own)
        prefix.fed = 0

    def forward(
        self, prefix: Prefix, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Any:
        """Never called: both are fed by their own."""
        raise AssertionError

    def reference(self, images: Any, sequence: TokenIds) -> Tensor:
        """Return what `answers` says."""
        return self.both[0].reference(torch.stack([pair[0] for pair in images]), sequence)

    def region_bytes(self, image: Any, nodes: int | None = None) -> int:
        """Return the bytes of the larger one."""
        return self.both[1].region_bytes(image[1])


def blip_base(end_id: int, start_id: int) -> CrossAttentionDecoder:
    """Build a BLIP of the base shape with random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    ids = {"bos_token_id": start_id, "eos_token_id": end_id, "sep_token_id": end_id}
    config = BlipConfig(
        vision_config={"image_size": BLIP_PIXELS},
        text_config={"vocab_size": BLIP_VOCABULARY, **ids},
    )
    model = BlipForConditionalGeneration(config).eval().requires_grad_(False)
    return CrossAttentionDecoder(
        model,
        model.text_decoder,
        lambda pixels: model.vision_model(pixel_values=pixels).last_hidden_state,
        start_ids=[start_id],
        end_ids=[end_id],
    )


def world_regions(count: int) -> list[Pixels]:
    """Return the demo's regions of a validation world's first test scenes."""
    settings = load_config(preset="demo").label.regions
    crops: list[Pixels] = []
    index = 0
    while len(crops) < count:
        pixels = render_scene(sample_scene(WORLD, "test", index, TEST_EXPONENT))
        height, width = pixels.shape[:2]
        image = DecodedImage(pixels, width, height)
        crops += list(CropBatch.of([image], [propose_regions(width, height, settings)]))
        index += 1
    return crops[:count]


@dataclass(frozen=True)
class Setting:
    """One model and its prompts; `images` are prepared."""

    name: str
    decoder: Decoder
    images: Any
    sequences: Sequence[TokenIds]

    def score_all(self) -> FloatArray:
        """Score every class: (R, C)."""
        return self.decoder.log_likelihoods(self.images, self.sequences).numpy()

    def encode(self) -> None:
        """Encode the images only."""
        for group in self.decoder.groups(self.images):
            self.decoder.encode(group)

    def search(self, top_k: int) -> tuple[FloatArray, dict[str, Any]]:
        """Search, group by group as the captioner does: (R, C) and what it fed."""
        scores, fed, padded, forwards, full = [], [], [], 0, 0
        counts = [1] * len(self.sequences)
        for group in self.decoder.groups(self.images):
            part, stats = score_top(self.decoder, group, self.sequences, counts, TopSearch(top_k))
            scores.append(part)
            fed += stats.nodes_fed.tolist()
            padded += stats.padded.tolist()
            forwards += stats.forwards
            full = stats.full_nodes
        return np.concatenate(scores), {
            "nodes": statistics.mean(fed),
            "padded": statistics.mean(padded),
            "full_nodes": full,
            "forwards": forwards,
        }

    def rows(self) -> dict[str, Callable[[], tuple[FloatArray, dict[str, Any]]]]:
        """Return what is compared with scoring everything."""
        return {f"top_k {k}": partial(self.search, k) for k in TOP_K}


def compare(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Time every row against scoring everything, and compare the answers."""
    calls = setting.rows()
    exact = setting.score_all()
    answers = {name: call() for name, call in calls.items()}  # warms up, too
    timed = {"all": setting.score_all, "encode": setting.encode, **calls}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, taken in seconds.items():
            start = time.process_time()
            timed[name]()
            taken.append(time.process_time() - start)
    rows = []
    for name, (scores, stats) in answers.items():
        rounds_of = list(zip(seconds[name], seconds["all"], seconds["encode"], strict=True))
        ratios = [mine / whole for mine, whole, _ in rounds_of]
        decoding = [(mine - common) / (whole - common) for mine, whole, common in rounds_of]
        row = {
            "setting": setting.name,
            "row": name,
            "regions": len(scores),
            "classes": exact.shape[1],
            "all_s": statistics.median(seconds["all"]),
            "encode_s": statistics.median(seconds["encode"]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "decoding_ratio": statistics.median(decoding),
            **stats,
            **compare_answers(name, exact, scores),
        }
        rows.append(row)
        print(
            f"{setting.name:10} {name:10} {row['all_s']:7.2f} {row['encode_s']:7.2f}"
            f"   {row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
            f"   {row['decoding_ratio']:8.2f}   {stats['nodes']:6.1f} of {stats['full_nodes']:4d}"
            f"   {stats['padded']:6.1f}   {stats['forwards']:8d}   {row['score_difference']:.0e}",
            flush=True,
        )
    return rows


def compare_answers(name: str, exact: FloatArray, scores: FloatArray) -> dict[str, Any]:
    """Compare a row's scores with all exact ones, and count classes that were kept by mistake."""
    measured: dict[str, Any] = dict(agreement(exact, scores, 10))
    expected = TopSearch(int(name.split()[1])).keep(exact)
    measured["other_classes"] = int((np.isfinite(expected) != np.isfinite(scores)).sum())
    return measured


def agreement(exact_RC: FloatArray, approximate_RC: FloatArray, k: int) -> dict[str, float]:
    """Compare scores of some classes (-inf elsewhere) with the exact scores of all.

    `top_1` and `top_k` are the shares of the exact best class and best k that were kept;
    `kept` the share of all classes; `score_difference` the largest difference of a kept score
    in nats. Of probabilities, a softmax over the classes: `lost_mass` is the mean exact
    probability of what was left out, `worst_lost_mass` its maximum over regions,
    `probability_difference` the mean over regions of the largest difference.
    """
    kept = approximate_RC > -np.inf
    order = np.argsort(-exact_RC, axis=1, kind="stable")
    found = np.take_along_axis(kept, order, axis=1)
    exact, approximate = _softmax(exact_RC), _softmax(approximate_RC)
    lost = np.where(kept, 0.0, exact).sum(axis=1)
    difference = np.abs(np.where(kept, exact_RC - np.where(kept, approximate_RC, 0.0), 0.0))
    return {
        "top_1": float(found[:, 0].mean()),
        "top_k": float(found[:, :k].mean()),
        "kept": float(kept.mean()),
        "score_difference": float(difference.max()),
        "lost_mass": float(lost.mean()),
        "worst_lost_mass": float(lost.max()),
        "probability_difference": float(np.abs(exact - approximate).max(axis=1).mean()),
    }


def _softmax(scores_RC: FloatArray) -> npt.NDArray[np.float64]:
    top = scores_RC.max(axis=1, keepdims=True)
    shifted = np.exp(scores_RC.astype(np.float64) - np.where(np.isfinite(top), top, 0.0))
    total = shifted.sum(axis=1, keepdims=True)
    probabilities: npt.NDArray[np.float64] = shifted / np.where(total > 0, total, 1.0)
    return probabilities


def settings(options: argparse.Namespace) -> dict[str, Callable[[int], Setting]]:
    """Return what builds each setting for a number of regions."""
    captioner, ended = (
        load_captioner(TeacherConfig(append_eos=append_eos)) for append_eos in (False, True)
    )
    assert isinstance(captioner, TransformersCaptioner)
    assert isinstance(ended, TransformersCaptioner)
    decoder = captioner.decoder
    assert decoder.by_trie
    end_id, start_id = decoder.end_id, decoder.start_ids[0]

    def prepared(count: int) -> Tensor:
        images: Tensor = captioner.prepare(world_regions(count))
        return images

    def of(name: str, table: ClassTable, source: Any, with_decoder: Any, images: Any) -> Setting:
        sequences = source.tokenize(table.primary_prompts)
        unknown = captioner.tokenizer.unk_token_id
        assert not any(unknown in sequence for sequence in sequences)
        return Setting(name, with_decoder, images, sequences)

    demo, hico = load_class_table("hico", world_class_ids()), hico_classes()
    width = captioner.decoder.model.config.decoder.hidden_size

    def pairs(count: int) -> list[tuple[Tensor, Tensor]]:
        small = prepared(count)
        large = torch.nn.functional.interpolate(small, (BLIP_PIXELS, BLIP_PIXELS))
        return list(zip(small, large, strict=True))

    large = blip_base(end_id, start_id) if options.large else None
    built: dict[str, Callable[[int], Setting]] = {
        "demo": lambda n: of("demo", demo, captioner, decoder, prepared(n)),
        "hico": lambda n: of("hico", hico, captioner, decoder, prepared(n)),
        "hico+end": lambda n: of("hico+end", hico, ended, ended.decoder, prepared(n)),
    }
    if large is not None:
        twin = TwinDecoder(decoder, large, width)
        built["size"] = lambda n: of("size", hico, captioner, twin, pairs(n))
        built["undecided"] = lambda n: of(
            "undecided", hico, captioner, large, torch.stack([pair[1] for pair in pairs(n)])
        )
    return built


@torch.inference_mode()
def main() -> None:
    """Run every setting, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument(
        "--checked", type=int, default=160, help="regions whose answers are compared"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=int, default=2, help="regions of BLIP base, 0 for none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, checks = [], []
    built = settings(options)
    print(
        "model      row          all s  encode   row/all (min..max)   decoding   nodes a region"
        "   padded   forwards   max |d nats|"
    )
    for name, build in built.items():
        large = name in {"size", "undecided"}
        rounds = min(2, options.rounds) if large else options.rounds
        rows += compare(build(options.large if large else options.regions), rounds)
    print(
        "\nmodel      row        classes kept   exact best kept   exact 10 kept   lost mass (worst)"
    )
    for name in ("demo", "hico"):
        setting = built[name](options.checked)
        exact = setting.score_all()
        for row, call in setting.rows().items():
            measured = compare_answers(row, exact, call()[0])
            checks.append({"setting": name, "row": row, "regions": len(exact), **measured})
            print(
                f"{name:10} {row:10}   {measured['kept']:10.3f}   {measured['top_1']:15.3f}"
                f"   {measured['top_k']:13.3f}   {measured['lost_mass']:9.4f}"
                f" ({measured['worst_lost_mass']:.3f})"
                + f"   other classes: {measured['other_classes']}"
            )
    report = {
        **measured_on(),
        "load_average": os.getloadavg()[0],
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "rows": rows,
        "agreement": checks,
    }
    write_results(options.out, report)


if __name__ == "__main__":
    main()
