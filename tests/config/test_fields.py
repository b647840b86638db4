"""The walk over all settings, and which of them change an answer."""

from hts_ray.config import (
    HtsConfig,
    LabelConfig,
    PoolConfig,
    find_setting,
    parse_config,
    walk_fields,
    walk_settings,
)


def test_only_settings_that_change_the_answer_are_hashed():
    """Would catch a cache that is lost by a larger pool, or kept for other regions."""
    base = LabelConfig()
    pool = parse_config({"label": {"pool": {"max_size": 4}, "batch_images": 3}}).label
    regions = parse_config({"label": {"regions": {"whole": False}}}).label
    assert base.answer_settings() == pool.answer_settings()
    assert base.answer_settings() != regions.answer_settings()
    assert "max_batch_regions" not in base.answer_settings()["teacher"]


def test_every_setting_can_be_named_on_the_command_line():
    """Would catch a field that dotted overrides cannot reach."""
    names = [setting.name for setting in walk_fields()]
    assert len(names) == len(set(names)) > 80
    assert "label.teacher.model" in names


def test_execution_is_inherited_and_sections_come_before_their_settings():
    """Would catch a sweep over how many actors run, or a section that completion never offers."""
    found = {setting.name: setting for setting in walk_settings(HtsConfig)}
    assert list(found).index("label.pool") < list(found).index("label.pool.threads")
    assert found["label.pool"].section is PoolConfig
    assert found["label.pool.threads"].execution
    assert not found["label.regions.whole"].execution
    assert found["label"].description == "The teacher pass: manifest in, region_scores out."
    assert find_setting("train.optim.lr") == found["train.optim.lr"]
    assert find_setting("train.optim.nothing") is None
