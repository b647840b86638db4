"""Class tables: ids, names and the English prompts that stand for each class.

A class is a verb-object pair ("ride", "bicycle") or any named thing ("red car"). HICO's 600
pairs are packaged; other classes come from a CSV file.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hts_ray.errors import ConfigError, DataError

MAX_CLASS_ID = 32767  # class ids are stored as int16
NO_INTERACTION = "no_interaction"
FEW_SHOT_LEVELS = (1, 5, 10)

# Verb -> the phrase between "a person" and the object. Written out, because English doubles
# consonants and drops letters by rules that have more exceptions than HICO has verbs.
VERB_PHRASES: dict[str, str] = {
    "adjust": "adjusting",
    "assemble": "assembling",
    "block": "blocking",
    "blow": "blowing",
    "board": "boarding",
    "break": "breaking",
    "brush_with": "brushing with",
    "buy": "buying",
    "carry": "carrying",
    "catch": "catching",
    "chase": "chasing",
    "check": "checking",
    "clean": "cleaning",
    "control": "controlling",
    "cook": "cooking",
    "cut": "cutting",
    "cut_with": "cutting with",
    "direct": "directing",
    "drag": "dragging",
    "dribble": "dribbling",
    "drink_with": "drinking with",
    "drive": "driving",
    "dry": "drying",
    "eat": "eating",
    "eat_at": "eating at",
    "exit": "exiting",
    "feed": "feeding",
    "fill": "filling",
    "flip": "flipping",
    "flush": "flushing",
    "fly": "flying",
    "greet": "greeting",
    "grind": "grinding",
    "groom": "grooming",
    "herd": "herding",
    "hit": "hitting",
    "hold": "holding",
    "hop_on": "hopping on",
    "hose": "hosing",
    "hug": "hugging",
    "hunt": "hunting",
    "inspect": "inspecting",
    "install": "installing",
    "jump": "jumping",
    "kick": "kicking",
    "kiss": "kissing",
    "lasso": "lassoing",
    "launch": "launching",
    "lick": "licking",
    "lie_on": "lying on",
    "lift": "lifting",
    "light": "lighting",
    "load": "loading",
    "lose": "losing",
    "make": "making",
    "milk": "milking",
    "move": "moving",
    NO_INTERACTION: "and",
    "open": "opening",
    "operate": "operating",
    "pack": "packing",
    "paint": "painting",
    "park": "parking",
    "pay": "paying",
    "peel": "peeling",
    "pet": "petting",
    "pick": "picking",
    "pick_up": "picking up",
    "point": "pointing",
    "pour": "pouring",
    "pull": "pulling",
    "push": "pushing",
    "race": "racing",
    "read": "reading",
    "release": "releasing",
    "repair": "repairing",
    "ride": "riding",
    "row": "rowing",
    "run": "running",
    "sail": "sailing",
    "scratch": "scratching",
    "serve": "serving",
    "set": "setting",
    "shear": "shearing",
    "sign": "signing",
    "sip": "sipping",
    "sit_at": "sitting at",
    "sit_on": "sitting on",
    "slide": "sliding",
    "smell": "smelling",
    "spin": "spinning",
    "squeeze": "squeezing",
    "stab": "stabbing",
    "stand_on": "standing on",
    "stand_under": "standing under",
    "stick": "sticking",
    "stir": "stirring",
    "stop_at": "stopping at",
    "straddle": "straddling",
    "swing": "swinging",
    "tag": "tagging",
    "talk_on": "talking on",
    "teach": "teaching",
    "text_on": "texting on",
    "throw": "throwing",
    "tie": "tying",
    "toast": "toasting",
    "train": "training",
    "turn": "turning",
    "type_on": "typing on",
    "walk": "walking",
    "wash": "washing",
    "watch": "watching",
    "wave": "waving",
    "wear": "wearing",
    "wield": "wielding",
    "zip": "zipping",
}

# Object -> the noun with its determiner, then other ways to say it.
OBJECT_PHRASES: dict[str, tuple[str, ...]] = {
    "airplane": ("an airplane", "a plane"),
    "apple": ("an apple",),
    "backpack": ("a backpack",),
    "banana": ("a banana",),
    "baseball_bat": ("a baseball bat", "a bat"),
    "baseball_glove": ("a baseball glove", "a baseball mitt"),
    "bear": ("a bear",),
    "bed": ("a bed",),
    "bench": ("a bench",),
    "bicycle": ("a bicycle", "a bike"),
    "bird": ("a bird",),
    "boat": ("a boat",),
    "book": ("a book",),
    "bottle": ("a bottle",),
    "bowl": ("a bowl",),
    "broccoli": ("broccoli", "some broccoli"),
    "bus": ("a bus",),
    "cake": ("a cake",),
    "car": ("a car",),
    "carrot": ("a carrot",),
    "cat": ("a cat",),
    "cell_phone": ("a cell phone", "a phone"),
    "chair": ("a chair",),
    "clock": ("a clock",),
    "couch": ("a couch", "a sofa"),
    "cow": ("a cow",),
    "cup": ("a cup",),
    "dining_table": ("a dining table", "a table"),
    "dog": ("a dog",),
    "donut": ("a donut", "a doughnut"),
    "elephant": ("an elephant",),
    "fire_hydrant": ("a fire hydrant",),
    "fork": ("a fork",),
    "frisbee": ("a frisbee",),
    "giraffe": ("a giraffe",),
    "hair_drier": ("a hair dryer", "a blow dryer"),
    "handbag": ("a handbag", "a purse"),
    "horse": ("a horse",),
    "hot_dog": ("a hot dog",),
    "keyboard": ("a keyboard",),
    "kite": ("a kite",),
    "knife": ("a knife",),
    "laptop": ("a laptop", "a laptop computer"),
    "microwave": ("a microwave", "a microwave oven"),
    "motorcycle": ("a motorcycle", "a motorbike"),
    "mouse": ("a computer mouse",),
    "orange": ("an orange",),
    "oven": ("an oven",),
    "parking_meter": ("a parking meter",),
    "person": ("another person",),
    "pizza": ("a pizza",),
    "potted_plant": ("a potted plant", "a plant"),
    "refrigerator": ("a refrigerator", "a fridge"),
    "remote": ("a remote control", "a remote"),
    "sandwich": ("a sandwich",),
    "scissors": ("scissors", "a pair of scissors"),
    "sheep": ("a sheep",),
    "sink": ("a sink",),
    "skateboard": ("a skateboard",),
    "skis": ("skis", "a pair of skis"),
    "snowboard": ("a snowboard",),
    "spoon": ("a spoon",),
    "sports_ball": ("a sports ball", "a ball"),
    "stop_sign": ("a stop sign",),
    "suitcase": ("a suitcase",),
    "surfboard": ("a surfboard",),
    "teddy_bear": ("a teddy bear",),
    "tennis_racket": ("a tennis racket",),
    "tie": ("a tie", "a necktie"),
    "toaster": ("a toaster",),
    "toilet": ("a toilet",),
    "toothbrush": ("a toothbrush",),
    "traffic_light": ("a traffic light",),
    "train": ("a train",),
    "truck": ("a truck",),
    "tv": ("a TV", "a television"),
    "umbrella": ("an umbrella",),
    "vase": ("a vase",),
    "wine_glass": ("a wine glass",),
    "zebra": ("a zebra",),
}

# Pairs whose plain verb reads badly or says something else. First the primary phrase, then
# another reading; "{o}" is the object with its determiner.
_PAIR_PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("blow", "cake"): ("blowing out candles on {o}", "blowing out the candles on {o}"),
    ("board", "car"): ("getting into {o}", "boarding {o}"),
    ("brush_with", "toothbrush"): ("brushing with {o}", "brushing teeth with {o}"),
    ("clean", "bed"): ("cleaning {o}", "making {o}"),
    ("control", "mouse"): ("controlling {o}", "using {o}"),
    ("control", "tv"): ("controlling {o}", "changing the channel on {o}"),
    ("cook", "carrot"): ("cooking carrots",),
    ("drink_with", "bottle"): ("drinking with {o}", "drinking from {o}"),
    ("drink_with", "cup"): ("drinking with {o}", "drinking from {o}"),
    ("eat", "cake"): ("eating {o}", "eating a piece of cake"),
    ("eat", "pizza"): ("eating {o}", "eating a slice of pizza"),
    ("fill", "wine_glass"): ("filling {o}", "pouring wine into {o}"),
    ("flip", "skateboard"): ("flipping {o}", "doing a flip trick on {o}"),
    ("grind", "skateboard"): ("grinding on {o}", "grinding a rail on {o}"),
    ("grind", "snowboard"): ("grinding on {o}", "grinding a rail on {o}"),
    ("herd", "cow"): ("herding cows", "herding cattle"),
    ("herd", "sheep"): ("herding sheep", "herding a flock of sheep"),
    ("hose", "car"): ("hosing down {o}", "spraying {o} with a hose"),
    ("hose", "dog"): ("hosing down {o}", "spraying {o} with a hose"),
    ("hose", "elephant"): ("hosing down {o}", "spraying {o} with a hose"),
    ("hose", "potted_plant"): ("hosing {o}", "watering {o} with a hose"),
    ("hold", "cake"): ("holding {o}", "holding a piece of cake"),
    ("hold", "pizza"): ("holding {o}", "holding a slice of pizza"),
    ("hold", "wine_glass"): ("holding {o}", "holding a glass of wine"),
    ("jump", "bicycle"): ("jumping {o}", "doing a jump on {o}"),
    ("jump", "boat"): ("jumping off {o}", "jumping from {o}"),
    ("jump", "car"): ("jumping {o}", "jump-starting {o}"),
    ("jump", "horse"): ("jumping {o}", "jumping over an obstacle on {o}"),
    ("jump", "motorcycle"): ("jumping {o}", "doing a jump on {o}"),
    ("jump", "skateboard"): ("jumping on {o}", "doing a jump on {o}"),
    ("jump", "skis"): ("jumping on {o}", "doing a ski jump on {o}"),
    ("jump", "snowboard"): ("jumping on {o}", "doing a jump on {o}"),
    ("jump", "surfboard"): ("jumping on {o}", "jumping off {o}"),
    ("light", "cake"): ("lighting candles on {o}", "lighting the candles on {o}"),
    ("load", "horse"): ("loading {o}", "loading {o} into a trailer"),
    ("load", "suitcase"): ("loading {o}", "loading {o} into a car"),
    ("load", "surfboard"): ("loading {o}", "loading {o} onto a car"),
    ("lose", "umbrella"): ("losing {o}", "losing {o} to the wind"),
    ("pay", "parking_meter"): ("paying {o}", "putting money into {o}"),
    ("pick_up", "pizza"): ("picking up {o}", "picking up a slice of pizza"),
    ("pour", "bottle"): ("pouring from {o}", "pouring a drink from {o}"),
    ("pour", "cup"): ("pouring into {o}", "pouring from {o}"),
    ("pull", "tie"): ("pulling on {o}", "pulling {o}"),
    ("read", "cell_phone"): ("reading on {o}", "reading something on {o}"),
    ("read", "laptop"): ("reading on {o}", "reading something on {o}"),
    ("ride", "airplane"): ("riding in {o}", "riding on {o}"),
    ("ride", "boat"): ("riding on {o}", "riding in {o}"),
    ("ride", "bus"): ("riding on {o}", "riding {o}"),
    ("ride", "car"): ("riding in {o}", "sitting in {o}"),
    ("ride", "skis"): ("riding on {o}", "skiing on {o}"),
    ("ride", "train"): ("riding on {o}", "riding {o}"),
    ("ride", "truck"): ("riding in {o}", "riding on the back of {o}"),
    ("run", "dog"): ("running with {o}", "running {o}"),
    ("run", "horse"): ("running with {o}", "running {o}"),
    ("set", "umbrella"): ("setting up {o}", "putting up {o}"),
    ("sip", "cup"): ("sipping from {o}", "taking a sip from {o}"),
    ("sip", "spoon"): ("sipping from {o}", "taking a sip from {o}"),
    ("sip", "wine_glass"): ("sipping from {o}", "sipping a glass of wine"),
    ("stick", "fork"): ("stabbing food with {o}", "sticking {o} into food"),
    ("stick", "knife"): ("stabbing with {o}", "sticking {o} into something"),
    ("stir", "bowl"): ("stirring {o}", "stirring food in {o}"),
    ("stir", "carrot"): ("stirring carrots",),
    ("tie", "boat"): ("tying up {o}", "tying {o} to a dock"),
    ("toast", "wine_glass"): ("toasting with {o}", "raising {o} for a toast"),
    ("turn", "motorcycle"): ("turning {o}", "making a turn on {o}"),
    ("watch", "tv"): ("watching TV", "watching television"),
    ("wave", "bus"): ("waving at {o}", "waving to {o}"),
    ("zip", "suitcase"): ("zipping up {o}", "zipping {o}"),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the some another this that these those my your his her its our their no any each every"
    " several many one two three four five six seven eight nine ten"
)
_PLURALS = _words("skis taxis people men women children mice geese teeth feet cattle police")
_SINGULAR_IN_S = _words("lens gas bus canvas atlas christmas tennis chaos cosmos texas")
_MASS_NOUNS = _words(
    "water grass snow ice sand food furniture luggage bread rice milk coffee tea wine beer cheese"
    " meat broccoli clothing equipment graffiti fog rain smoke mud traffic garbage trash"
)
_PARTICLES = _words(
    "about across after against around at away behind by down for from in into of off on onto out"
    " over through to toward under up upon with"
)
# How a word is said decides between "a" and "an", its letters only mostly do.
_SAID_WITH_A_VOWEL = re.compile(r"hour|hono|honest|heir|unin|unim|unid")
_SAID_WITH_A_CONSONANT = re.compile(r"uni|us[aeu]|uti|ubi|eu|ewe|(one|once)\b")


@dataclass(frozen=True)
class HoiClass:
    """One class: its id (0 to 32767), display name, optional verb and object, and prompts.

    `prompts[0]` is the primary sentence; there is at least one.
    """

    class_id: int
    name: str
    verb: str | None
    object: str | None
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.class_id <= MAX_CLASS_ID:
            raise ConfigError(
                field="class_id", value=self.class_id, remedy=f"use 0 to {MAX_CLASS_ID}"
            )
        if not self.prompts:
            raise ConfigError(field="prompts", value=self.name, remedy="give at least one prompt")


@dataclass(frozen=True, eq=False)
class ClassTable:
    """The C classes of a run, in the order of every score vector.

    `few_shot` maps 1, 5 and 10 to a (C,) bool mask of the classes with at most that many
    training positives; it is empty where that is not known. Raises DataError on no classes,
    or ids, names or primary prompts that occur twice.
    """

    classes: tuple[HoiClass, ...]
    few_shot: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.classes:
            raise DataError("a class table needs at least one class")
        for label, values in (
            ("class_id", [str(c.class_id) for c in self.classes]),
            ("name", [c.name.casefold() for c in self.classes]),
            ("primary prompt", [c.prompts[0].casefold() for c in self.classes]),
        ):
            twice = _first_repeat(values)
            if twice is not None:
                raise DataError(f"{label} {values[twice[1]]!r} occurs twice: make it unique")
        for level, mask in self.few_shot.items():
            if mask.shape != (len(self.classes),):
                raise DataError(
                    f"few_shot[{level}] has shape {mask.shape}, not ({len(self.classes)},)"
                )

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[HoiClass]:
        return iter(self.classes)

    def __getitem__(self, position: int) -> HoiClass:
        return self.classes[position]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassTable):
            return NotImplemented
        return self.classes == other.classes and _same_masks(self.few_shot, other.few_shot)

    def __hash__(self) -> int:
        return hash(self.classes)

    @cached_property
    def ids(self) -> npt.NDArray[np.int16]:
        """(C,) int16, read-only."""
        ids = np.array([c.class_id for c in self.classes], dtype=np.int16)
        ids.setflags(write=False)
        return ids

    @property
    def names(self) -> list[str]:
        """C display names."""
        return [c.name for c in self.classes]

    @property
    def primary_prompts(self) -> list[str]:
        """C primary sentences."""
        return [c.prompts[0] for c in self.classes]

    @property
    def prompts(self) -> list[tuple[str, ...]]:
        """C tuples of prompts, the primary one first."""
        return [c.prompts for c in self.classes]

    @cached_property
    def positions(self) -> Mapping[int, int]:
        """Class id to position in the table."""
        return {c.class_id: position for position, c in enumerate(self.classes)}

    def index_of(self, class_id: int) -> int:
        """Return the position of a class id; DataError naming the nearest id when unknown."""
        position = self.positions.get(int(class_id))
        if position is None:
            near = min(self.positions, key=lambda known: abs(known - int(class_id)))
            raise DataError(
                f"class_id {class_id} is not among the {len(self)} classes: the nearest is"
                f" {near} ({self.classes[self.positions[near]].name})"
            )
        return position

    def subset(self, ids: Iterable[int]) -> ClassTable:
        """Return the table of these class ids, in the order given; DataError for unknown ids."""
        rows = [self.index_of(class_id) for class_id in ids]
        return ClassTable(
            tuple(self.classes[row] for row in rows),
            {level: _frozen(mask[rows]) for level, mask in self.few_shot.items()},
        )

    def fingerprint(self) -> str:
        """Return a sha256 in hex that changes with any id, prompt, or their order."""
        content = [[c.class_id, list(c.prompts)] for c in self.classes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_csv(self, path: str | Path) -> None:
        """Write the table so that `read_class_csv` returns an equal one."""
        width = max(len(c.prompts) for c in self.classes)
        levels = sorted(self.few_shot)
        header = ["class_id", "name", "verb", "object"]
        header += [f"prompt_{i + 1}" for i in range(width)] + [f"few_{level}" for level in levels]
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            for row, c in enumerate(self.classes):
                padded = [*c.prompts, *[""] * (width - len(c.prompts))]
                flags = [int(self.few_shot[level][row]) for level in levels]
                writer.writerow([c.class_id, c.name, c.verb or "", c.object or "", *padded, *flags])


def noun_phrase(noun: str) -> str:
    """Return a noun with the determiner it needs: "red car" -> "a red car".

    A determiner that is there is kept; plurals and mass nouns get none. The rules are a
    heuristic: write the prompts out where they fail.
    """
    text = _spaced(noun)
    words = text.split(" ")
    if words[0].casefold() in _DETERMINERS or words[0][:1].isdigit():
        return text
    # In "a bowl of oranges" or "man with glasses" the head stands before the preposition.
    cut = next((i for i, word in enumerate(words) if i and word in _PARTICLES), len(words))
    if _takes_no_article(words[cut - 1].casefold()):
        return text
    return f"{_article(words[0])} {text}"


def verb_phrase(verb: str) -> str:
    """Return the -ing phrase of a verb: "hop_on" -> "hopping on".

    HICO's verbs are listed; others are inflected by rule, the first word being the verb. An
    -ing form is kept.
    """
    known = VERB_PHRASES.get(_key(verb))
    if known is not None:
        return known
    head, _, rest = _spaced(verb).partition(" ")
    return f"{_ing(head)} {rest}".strip()


def pair_prompts(verb: str, obj: str) -> tuple[str, ...]:
    """Return the six prompts of a verb-object pair, the primary sentence first.

    Prompt i follows the same template in every class; the last one is another way to say it
    (another noun or another phrase) where there is one. HICO's objects are known with HICO's
    meaning ("mouse" is the computer's), spaces and underscores being the same.
    """
    nouns = OBJECT_PHRASES.get(_key(obj)) or (noun_phrase(obj),)
    if _key(verb) == NO_INTERACTION:
        return (
            f"a person and {nouns[0]}",
            f"a photo of a person and {nouns[0]}",
            f"someone near {nouns[0]}",
            f"a man and {nouns[0]}",
            f"a woman and {nouns[0]}",
            f"a person next to {nouns[0]}",
        )
    phrases = _PAIR_PHRASES.get((_key(verb), _key(obj)), (verb_phrase(verb) + " {o}",))
    return _person_prompts(
        phrases[0].replace("{o}", nouns[0]),  # not format: a user's noun may hold braces
        _other_wording(phrases, nouns),
    )


def name_prompts(name: str) -> tuple[str, ...]:
    """Return the five prompts of a named class, "a photo of a red car" first."""
    noun = noun_phrase(name)
    return (
        f"a photo of {noun}",
        f"a picture of {noun}",
        f"an image of {noun}",
        f"a photo showing {noun}",
        f"a close-up photo of {noun}",
    )


@lru_cache(maxsize=1)
def hico_classes() -> ClassTable:
    """Return HICO's 600 verb-object classes in the order of `list_action`, with `few_shot`."""
    return read_class_csv(Path(__file__).with_name("hico_classes.csv"))


def load_class_table(source: str | Path = "hico", ids: Iterable[int] | None = None) -> ClassTable:
    """Return the classes of a run: `"hico"` or the path of a CSV file, cut down to `ids` if given.

    Raises ConfigError when `source` is neither, DataError when the file cannot be used.
    """
    if str(source) == "hico":
        table = hico_classes()
    else:
        path = Path(source)
        if not path.is_file():
            near = difflib.get_close_matches(str(source).casefold(), ["hico"], cutoff=0.5)
            hint = "did you mean 'hico'?" if near else "write 'hico' or the path of a CSV file"
            raise ConfigError("no such file", field="classes", value=str(source), remedy=hint)
        table = read_class_csv(path)
    return table if ids is None else table.subset(ids)


def read_class_csv(path: str | Path) -> ClassTable:
    """Read classes from a UTF-8 CSV file with a header line.

    Columns: `verb` and `object`, or `name`, or both; `class_id` (else the row's order from 0);
    prompts as one `prompts` cell with `|` between them or as columns `prompt_1`, `prompt_2`;
    `few_1`, `few_5`, `few_10` as 0 or 1. Other columns are ignored unless their name looks
    like a slip for one of these. Raises DataError naming file, line, value and remedy.
    """
    header, rows = _csv_rows(path)
    columns = _columns(header, path)
    if not rows:
        raise DataError(f"{path} has a header but no classes: add one row a class")
    if len(rows) > MAX_CLASS_ID + 1:
        raise DataError(f"{path} has {len(rows)} classes: at most {MAX_CLASS_ID + 1} are possible")
    ids = _class_ids(rows, columns, path)
    classes = [
        _class_of(row, line, class_id, columns, path)
        for (line, row), class_id in zip(rows, ids, strict=True)
    ]
    lines = [line for line, _ in rows]
    _refuse_repeats(classes, lines, path)
    few = {
        level: _flags(rows, columns[f"few_{level}"], f"few_{level}", path)
        for level in FEW_SHOT_LEVELS
        if f"few_{level}" in columns
    }
    return ClassTable(tuple(classes), few)


_KNOWN_COLUMNS = (
    "class_id",
    "name",
    "verb",
    "object",
    "prompts",
    "prompt",
    *(f"few_{level}" for level in FEW_SHOT_LEVELS),
)
_PROMPT_COLUMN = re.compile(r"prompts?_?(\d+)?")


def _csv_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"class file {path} cannot be read: {error}") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16: save it as UTF-8 ('CSV UTF-8' in a spreadsheet)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8:"
            " save it as UTF-8 ('CSV UTF-8' in a spreadsheet)"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: holds a zero byte: this is not a text file")
    return text


def _csv_rows(path: str | Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the (line number, cells) of every row that is not blank."""
    reader = csv.reader(io.StringIO(_csv_text(path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for raw in reader:
            cells = [" ".join(cell.split()) for cell in raw]
            if any(cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: {error}: check the quotes, a quote inside a cell is doubled"
        ) from error
    if not rows:
        raise DataError(f"{path} is empty: it needs a header such as class_id,verb,object")
    header = [cell.casefold() for cell in rows[0][1]]
    for line, cells in rows[1:]:
        extra = [cell for cell in cells[len(header) :] if cell]
        if extra:
            raise DataError(
                f"{path}, line {line}: {extra[0]!r} stands beyond the last column"
                f" ({len(header)} in the header): quote cells that contain a comma"
            )
    return header, [(line, cells + [""] * (len(header) - len(cells))) for line, cells in rows[1:]]


def _columns(header: Sequence[str], path: str | Path) -> dict[str, int]:
    columns: dict[str, int] = {}
    for index, name in enumerate(header):
        if name and name in columns:
            raise DataError(f"{path}, line 1: column {name!r} stands twice: keep one")
        columns[name] = index
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise DataError(f"{path}, line 1: {header[0]!r} is one column: use commas between columns")
    for name in columns:
        if name in _KNOWN_COLUMNS or _PROMPT_COLUMN.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, set(_KNOWN_COLUMNS) - set(columns), 1, cutoff=0.8)
        if near:
            raise DataError(f"{path}, line 1: column {name!r}: did you mean {near[0]!r}?")
    if not columns.keys() & {"name", "verb", "object"}:
        raise DataError(
            f"{path}, line 1: neither verb and object nor name among the columns"
            f" ({', '.join(map(repr, header[:12]))}): the first line must name them"
        )
    return columns


def _cell(row: Sequence[str], columns: Mapping[str, int], name: str) -> str:
    return row[columns[name]] if name in columns else ""


def _class_ids(
    rows: Sequence[tuple[int, list[str]]], columns: Mapping[str, int], path: str | Path
) -> list[int]:
    if "class_id" not in columns:
        return list(range(len(rows)))
    ids: dict[int, int] = {}
    for line, row in rows:
        value = _cell(row, columns, "class_id")
        if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > MAX_CLASS_ID:
            raise DataError(
                f"{path}, line {line}: class_id {value!r} is not a whole number from 0 to"
                f" {MAX_CLASS_ID}: mend it, or drop the column to number the rows"
            )
        if int(value) in ids:
            raise DataError(
                f"{path}, line {line}: class_id {value} is taken by line {ids[int(value)]}:"
                " give every class its own"
            )
        ids[int(value)] = line
    return list(ids)


def _class_of(
    row: Sequence[str], line: int, class_id: int, columns: Mapping[str, int], path: str | Path
) -> HoiClass:
    verb, obj = _cell(row, columns, "verb"), _cell(row, columns, "object")
    name = _cell(row, columns, "name")
    if not (name or verb or obj):
        raise DataError(f"{path}, line {line}: no name, verb or object: fill one in")
    if _key(verb) == NO_INTERACTION and not obj:
        raise DataError(f"{path}, line {line}: verb {verb!r} needs an object: fill it in")
    prompts = _given_prompts(row, columns)
    if not prompts:
        if verb and obj:
            prompts = pair_prompts(verb, obj)
        elif verb:
            prompts = _person_prompts(verb_phrase(verb))
        else:
            prompts = name_prompts(name or obj)
    return HoiClass(class_id, name or _pair_name(verb, obj), verb or None, obj or None, prompts)


def _given_prompts(row: Sequence[str], columns: Mapping[str, int]) -> tuple[str, ...]:
    numbered = []
    for name, index in columns.items():
        match = _PROMPT_COLUMN.fullmatch(name)
        if match:
            # Only the unnumbered cell is split, so that to_csv can keep a "|" in a prompt.
            cells = row[index].split("|") if match[1] is None else [row[index]]
            numbered.append((int(match[1] or 0), cells))
    found = [cell.strip() for _, cells in sorted(numbered) for cell in cells]
    return tuple(dict.fromkeys(prompt for prompt in found if prompt))


def _person_prompts(main: str, other: str | None = None) -> tuple[str, ...]:
    return (
        f"a person {main}",
        f"a photo of a person {main}",
        f"someone {main}",
        f"a man {main}",
        f"a woman {main}",
        f"a person {other}" if other else f"a picture of a person {main}",
    )


def _pair_name(verb: str, obj: str) -> str:
    if _key(verb) == NO_INTERACTION:
        return f"no interaction with {_spaced(obj)}"
    return f"{_spaced(verb)} {_spaced(obj)}".strip()


def _refuse_repeats(classes: Sequence[HoiClass], lines: Sequence[int], path: str | Path) -> None:
    for label, values, remedy in (
        ("class", [c.name for c in classes], "every class needs its own name"),
        ("prompt", [c.prompts[0] for c in classes], "no teacher could tell these classes apart"),
    ):
        twice = _first_repeat([value.casefold() for value in values])
        if twice is not None:
            first, second = twice
            raise DataError(
                f"{path}, line {lines[second]}: {label} {values[second]!r} stands in line"
                f" {lines[first]} too: {remedy}"
            )


def _flags(
    rows: Sequence[tuple[int, list[str]]], column: int, name: str, path: str | Path
) -> npt.NDArray[np.bool_]:
    for line, row in rows:
        if row[column] not in ("0", "1"):
            raise DataError(f"{path}, line {line}: {name} {row[column]!r}: write 0 or 1")
    return _frozen(np.array([row[column] == "1" for _, row in rows], dtype=bool))


def _first_repeat(values: Sequence[str]) -> tuple[int, int] | None:
    seen: dict[str, int] = {}
    for index, value in enumerate(values):
        if value in seen:
            return seen[value], index
        seen[value] = index
    return None


def _frozen(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    mask.setflags(write=False)
    return mask


def _same_masks(
    one: Mapping[int, npt.NDArray[np.bool_]], other: Mapping[int, npt.NDArray[np.bool_]]
) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def _spaced(text: str) -> str:
    return " ".join(text.replace("_", " ").split()) or text


def _key(text: str) -> str:
    return "_".join(text.replace("_", " ").split()).casefold()


def _other_wording(phrases: Sequence[str], nouns: Sequence[str]) -> str | None:
    if len(phrases) > 1:
        return phrases[1].replace("{o}", nouns[0])
    if len(nouns) > 1 and "{o}" in phrases[0]:
        return phrases[0].replace("{o}", nouns[1])
    return None


def _takes_no_article(head: str) -> bool:
    if head in _PLURALS or head in _MASS_NOUNS:
        return True
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    return plural and len(head) > 2 and head not in _SINGULAR_IN_S


def _article(word: str) -> str:
    lower = word.casefold()
    if word.isupper() and len(word) <= 3:  # said letter by letter: "an MRI", "a UFO"
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    if _SAID_WITH_A_VOWEL.match(lower):
        return "an"
    if _SAID_WITH_A_CONSONANT.match(lower):
        return "a"
    return "an" if lower[:1] in set("aeiou") else "a"


def _ing(word: str) -> str:
    if word.endswith("ing") and len(word) > 5:
        return word
    if word.endswith("ie"):
        return word[:-2] + "ying"
    if word.endswith("e") and not word.endswith(("ee", "oe", "ye")) and len(word) > 2:
        return word[:-1] + "ing"
    # One syllable ending in consonant, vowel, consonant doubles the last: "jog" -> "jogging".
    if re.fullmatch(r"([^aeiou]*|qu)[aeiou][^aeiouwxy]", word):
        return word + word[-1] + "ing"
    return word + "ing"
