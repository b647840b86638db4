"""The classes that images are labeled with, and the sentences that stand for them."""

from hts_ray.classes.table import (
    NO_INTERACTION,
    OBJECT_PHRASES,
    VERB_PHRASES,
    ClassTable,
    HoiClass,
    hico_classes,
    load_class_table,
    name_prompts,
    noun_phrase,
    pair_prompts,
    read_class_csv,
    verb_phrase,
)

__all__ = [
    "NO_INTERACTION",
    "OBJECT_PHRASES",
    "VERB_PHRASES",
    "ClassTable",
    "HoiClass",
    "hico_classes",
    "load_class_table",
    "name_prompts",
    "noun_phrase",
    "pair_prompts",
    "read_class_csv",
    "verb_phrase",
]
