"""Tests of asking: every family that answers questions against its own top-level forward.

What is expected comes from what each processor makes of image and whole question, one forward a
class: nothing of the package takes part in it but which tokens mean yes and no.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from hts_ray.config import CaptionConfig, TeacherConfig
from hts_ray.errors import ConfigError
from hts_ray.teacher.captioner import AskedCaptioner
from hts_ray.teacher.models import families
from hts_ray.teacher.models.catalog import ONLY_CAPTIONERS, check_teacher
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.models.questions import AnswerTokens, SplitQuestions, WholeQuestions

QUESTION = "Answer yes or no. Does this image show {}?"
PHRASES = [
    "a person riding a horse",
    "a person riding a bicycle",
    "a person riding a bicycle wheel",
    "a hot dog",
    "a dog",
]
RNG = np.random.default_rng(0)
# Grids, tiles and prefix lengths differ.
IMAGES = [RNG.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((48, 64), (64, 40))]
WHOLE = {"blip2_t5", "instructblip_t5", "instructblip_vicuna", "paligemma", "paligemma2"}
SILENT = {"blip", "git", "vit_bert", "vit_trocr", "florence2", "kosmos2"}
ASKED = [name for name in tiny_models.BUILDERS if name not in SILENT]


@cache
def asked(path: Path, **settings: Any) -> Any:
    settings = {"prompt_batch": 4, "pad_to_square": "never", **settings}
    config = TeacherConfig(model=str(path), mode="questions", **settings)
    return load_captioner(config)


@cache
def parts(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


def inputs(name: str, processor: Any, picture: Any, question: str) -> dict[str, Any]:
    """Return the inputs that a family's documentation makes of an image and a question."""
    texts = {
        "blip2": f"Question: {question} Answer:",
        "instructblip": question,
        "paligemma": f"<image>answer en {question}",
        "paligemma2": f"<image>answer en {question}",
        "llava_sliding": f"USER: <image>\n{question} ASSISTANT:",
    }
    text = texts.get(name, texts.get(name.split("_", maxsplit=1)[0] if "blip" in name else ""))
    if text is None:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    else:
        found = processor(images=picture, text=text, return_tensors="pt")
    if name.endswith("t5"):
        found["decoder_input_ids"] = torch.tensor([[processor.tokenizer.pad_token_id]])
    return dict(found)


@torch.inference_mode()
def expected(name: str, path: Path, image: np.ndarray, phrase: str) -> float:
    model, processor = parts(path)
    question = QUESTION.replace("{}", phrase)
    logits = model(**inputs(name, processor, Image.fromarray(image), question)).logits[0, -1]
    answers = asked(path).questions.answers
    of_words = [logits.log_softmax(-1)[list(ids)].logsumexp(0) for ids in (answers.yes, answers.no)]
    return float(of_words[0] - of_words[1])


@pytest.mark.parametrize("name", ASKED)
def test_answers_equal_full_forwards(name: str, tiny_path: Callable[[str], Path]) -> None:
    """Catches a wrong position read out, or words of the question lost at the split."""
    path = tiny_path(name)
    captioner = asked(path)
    assert isinstance(captioner, AskedCaptioner)
    kind = WholeQuestions if name in WHOLE else SplitQuestions
    assert isinstance(captioner.questions, kind)
    wanted = np.array([[expected(name, path, i, phrase) for phrase in PHRASES] for i in IMAGES])
    found = captioner.ask(IMAGES, PHRASES)
    np.testing.assert_allclose(found.log_odds, wanted, atol=1e-4)
    alone = [captioner.ask([image], PHRASES[::-1]).log_odds[0, ::-1] for image in IMAGES]
    np.testing.assert_allclose(alone, wanted, atol=1e-4)
    assert (found.token_counts > 2).all()
    # Image and class must matter, or everything above proves little.
    assert np.abs(np.diff(wanted, axis=0)).max() > 2e-3
    assert np.abs(np.diff(wanted, axis=1)).max() > 0.01


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_sliding", "paligemma"])
def test_answers_hold_in_small_groups(
    name: str, tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches questions that come back in another order when memory cuts them into groups."""
    captioner = asked(tiny_path(name))
    wanted = captioner.ask(IMAGES, PHRASES).log_odds
    monkeypatch.setattr(captioner.decoder, "workspace", 1)
    monkeypatch.setattr("hts_ray.teacher.scoring.trie.MAX_NODES", 8)
    monkeypatch.setattr("hts_ray.teacher.scoring.trie.MAX_LOGITS", 500)
    captioner.decoder.split.cache_clear()
    np.testing.assert_allclose(captioner.ask(IMAGES, PHRASES).log_odds, wanted, atol=1e-4)
    captioner.decoder.split.cache_clear()


def test_whole_questions_see_an_image_once(
    tiny_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an image encoder that runs for every class, or stays patched when asking fails."""
    captioner = asked(tiny_path("instructblip_t5"))
    vision, seen = captioner.questions.vision, []
    handle = vision.embeddings.register_forward_hook(lambda *_: seen.append(1))
    captioner.ask(IMAGES[:2], PHRASES)
    assert len(seen) == 2
    monkeypatch.setattr(captioner.decoder, "encode", lambda group: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captioner.ask(IMAGES[:1], PHRASES)
    handle.remove()
    assert vision.forward.__name__ == "forward"


def test_answers_are_what_they_say(tiny_path: Callable[[str], Path]) -> None:
    """Catches a spelling left out, or the piece of another word taken for an answer."""
    captioner = asked(tiny_path("qwen2_vl"))
    tokenizer, answers = captioner.tokenizer, captioner.questions.answers
    said = [{tokenizer.decode([i]) for i in ids} for ids in (answers.yes, answers.no)]
    assert said == [{"yes", "Yes", " yes"}, {"no", "No", " no"}]
    logits = torch.zeros(captioner.decoder.vocabulary)[list(answers.both)]
    assert answers.log_odds(logits).item() == 0
    logits[0] = 3.0
    assert answers.log_odds(logits).item() == pytest.approx(np.log((np.exp(3) + 2) / 3), abs=1e-5)


def test_tokenizers_that_cannot_answer() -> None:
    """Catches answers read off a first piece that yes and no share."""
    one_each = {"yes": [5], " yes": [6], "no": [7]}
    assert AnswerTokens.of(lambda said: [one_each.get(s, [1, 2]) for s in said]) == AnswerTokens(
        (5, 6), (7,)
    )
    assert AnswerTokens.of(lambda said: [[3] for _ in said]) is None  # unknown words
    assert AnswerTokens.of(lambda said: [[3, 4] for _ in said]) is None  # letters


def test_the_instruction_is_for_captions(tiny_path: Callable[[str], Path]) -> None:
    """Catches captions written behind the question, or the question cut by the instruction."""
    path, settings = tiny_path("qwen2_vl"), CaptionConfig(max_tokens=4)
    usual = load_captioner(TeacherConfig(model=str(path), pad_to_square="never"))
    assert asked(path).caption(IMAGES, settings) == usual.caption(IMAGES, settings)
    other = asked(path, instruction="a photo of")
    assert other.caption(IMAGES, settings) != usual.caption(IMAGES, settings)
    np.testing.assert_array_equal(
        other.ask(IMAGES, PHRASES).log_odds, asked(path).ask(IMAGES, PHRASES).log_odds
    )
    shorter = asked(path, question="{}?").ask(IMAGES, PHRASES).log_odds
    assert np.abs(shorter - asked(path).ask(IMAGES, PHRASES).log_odds).max() > 0.01


@pytest.mark.parametrize("name", sorted(SILENT))
def test_captioners_are_refused_before_they_load(
    name: str, tiny_path: Callable[[str], Path]
) -> None:
    """Catches a captioner asked what it never learned, found out by an actor of a cluster."""
    with pytest.raises(ConfigError, match=r"answers no questions.*mode=prompts"):
        check_teacher(TeacherConfig(model=str(tiny_path(name)), mode="questions"))


def test_the_list_of_captioners_names_families() -> None:
    """Catches a family that can be asked in the list, or one without a frame for questions."""
    assert set(families._BUILDERS) >= ONLY_CAPTIONERS
    assert len(ONLY_CAPTIONERS) == len(SILENT) - 1  # two of the builders are one family


# -- thoughts ----------------------------------------------------------------------------------

OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
SWITCH = (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
ALIEN = "{% if add_generation_prompt %}<|im_start|>assistant\n◁think▷{% endif %}"


@pytest.mark.parametrize(
    ("opening", "closed"),
    [(OPEN, "<think>\n\n</think>\n\n"), (SWITCH, "<think>\n\n</think>\n\n"),
     (ALIEN, "◁think▷\n\n◁/think▷\n\n")],
)  # fmt: skip
def test_thoughts_are_closed(
    opening: str, closed: str, tiny_path: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches captions, prompts and answers that are read off a model's opened thoughts."""
    shutil.copytree(tiny_path("qwen2_vl"), tmp_path / "thinker")
    plain = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = tiny_models.QWEN_TEMPLATE
    assert plain in template
    (tmp_path / "thinker" / "chat_template.jinja").write_text(template.replace(plain, opening))
    processor = parts(tmp_path / "thinker")[1]
    for words in ("Describe it.", "Think in <think> tags, or <think></think>. Is it {}?"):
        text, glue = families._chat_text(processor, words)
        assert text.endswith(f"assistant\n{closed}")
        assert text.count(closed) == 1
        assert glue == ""
    untouched, _ = families._chat_text(parts(tiny_path("qwen2_vl"))[1], "Is <think> a word?")
    assert untouched.endswith("assistant\n")
    fed = asked(tmp_path / "thinker").questions.encode(PHRASES[:1])[0]
    assert processor.tokenizer.decode(fed).endswith(f"assistant\n{closed}")
