"""The classes that images are labeled with, and the sentences that stand for them."""

from hts_ray.classes.prompts import NO_INTERACTION as NO_INTERACTION
from hts_ray.classes.prompts import OBJECT_PHRASES as OBJECT_PHRASES
from hts_ray.classes.prompts import VERB_PHRASES as VERB_PHRASES
from hts_ray.classes.prompts import name_prompts as name_prompts
from hts_ray.classes.prompts import noun_phrase as noun_phrase
from hts_ray.classes.prompts import pair_prompts as pair_prompts
from hts_ray.classes.prompts import verb_phrase as verb_phrase
from hts_ray.classes.read_csv import hico_classes as hico_classes
from hts_ray.classes.read_csv import load_class_table as load_class_table
from hts_ray.classes.read_csv import name_classes as name_classes
from hts_ray.classes.read_csv import parse_class_csv as parse_class_csv
from hts_ray.classes.read_csv import read_class_csv as read_class_csv
from hts_ray.classes.table import ClassTable as ClassTable
from hts_ray.classes.table import HoiClass as HoiClass
