"""Measure the memory of scoring 16 regions x 600 prompts at a vocabulary of 152,000.

    python benchmarks/scoring_memory.py [--regions 16] [--vocabulary 151936]

GIT-base's shape with a large vocabulary, random weights, one thread, float32. Resident memory is
sampled every 2 ms while `TransformersCaptioner`'s decoder scores; what counts is the peak above
what the loaded model took before. All logits at once, which the chunks avoid, are printed for
comparison. JSON goes to benchmarks/results/scoring_memory.json.
"""

from __future__ import annotations

import argparse
import gc
import threading
from pathlib import Path

import psutil
import torch
from measured import measured_on, write_results
from trie_speed import END, START, hico_tokens

from hts_ray.teacher.models.architectures import GitDecoder

RESULTS = Path(__file__).parent / "results" / "scoring_memory.json"
GB = 1e9


class Peak(threading.Thread):
    """Samples this process's resident memory until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process()
        self.start_bytes = self.peak_bytes = self.process.memory_info().rss
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample."""
        while not self._stopped.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss)

    def stop(self) -> float:
        """Return the peak above the start, in GB."""
        self._stopped.set()
        self.join()
        return float(self.peak_bytes - self.start_bytes) / GB


@torch.inference_mode()
def main() -> None:
    """Print and store the peak."""
    from transformers import GitConfig, GitForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = GitConfig(vocab_size=options.vocabulary, vision_config={"image_size": 224})
    model = GitForCausalLM(config).eval()
    decoder = GitDecoder(model, start_ids=[START], end_ids=[END])
    sequences = hico_tokens(append_eos=True)
    images = torch.randn(options.regions, 3, 224, 224)
    # What a first forward leaves behind belongs to the library, not to these scores.
    decoder.log_likelihoods(images[:1], sequences[:2])
    nodes = sum(len(trie) for trie, _ in decoder.tries(sequences))
    gc.collect()
    watch = Peak()
    watch.start()
    scores = decoder.log_likelihoods(images, sequences)
    peak = watch.stop()
    groups = sum(1 for _ in decoder.groups(images))
    row = {
        "regions": options.regions,
        "prompts": len(sequences),
        "vocabulary": options.vocabulary,
        "fed_nodes": nodes,
        "region_groups": groups,
        "model_gb": sum(p.numel() * p.element_size() for p in model.parameters()) / GB,
        "peak_above_model_gb": peak,
        "all_logits_would_take_gb": options.regions * nodes * options.vocabulary * 4 / GB,
    }
    assert bool(torch.isfinite(scores).all())
    for name, value in row.items():
        print(f"{name:26} {value:.3g}" if isinstance(value, float) else f"{name:26} {value}")
    report = {**measured_on(), "settings": {"threads": 1, "dtype": "float32"}, **row}
    write_results(options.out, report)


if __name__ == "__main__":
    main()
