"""Full trainings that Ray Tune runs and Ray Train does; many nodes are tests/faults' matter."""

from functools import partial

import pyarrow.compute as pc
import pytest

from hts_ray.errors import UserError
from hts_ray.store.run import require_stage
from hts_ray.sweep.log import OWN
from hts_ray.sweep.space import build_space
from hts_ray.sweep.trainings import CURVE, Training, curve_work, train_students
from hts_ray.sweep.tune import search


@pytest.mark.slow
def test_students_are_trained_in_full_with_curves_and_reasons(with_sweep, tmp_path, ray_session):
    """Would catch a failure taken for a student, a curve with gaps, or a training run twice."""
    space = {"filter.max_positives_per_image": {"choices": [100, 101]}}  # the same student twice
    run = with_sweep(
        sweep={"train": "full", "trials": 2, "reduction": 9.0, "space": space},
        train={"num_workers": 1, "epochs": 2, "validation_split": None},
    )
    scores = require_stage(run.run_dir, "region_scores", "label")
    table = run.manifest().table
    ids = table.filter(pc.equal(table["split"], "train"))["image_id"].to_pylist()
    held_out = table.filter(pc.equal(table["split"], "test"))
    training = Training(run, scores, str(tmp_path / "finalists"), (tuple(ids),), held_out)
    found = build_space(run.config, scores.path)
    trials = search(run.config.sweep, found, partial(curve_work, training), folder=str(tmp_path))
    assert sorted(trials) == [0, 1]
    own = trials[OWN]
    assert own.status == "complete", own.message
    assert len(own.reports) == 2
    assert own.metrics[CURVE] == own.reports[-1] > 0
    unfit = {"filter.min_support": 50}
    first, second = train_students(training, [(OWN, own.settings, 0), (9, unfit, 0)])
    student = first()
    assert student.stats["validation_mAP"] == own.reports[-1]  # the trial's own, not a new one
    with pytest.raises(UserError, match="no pseudo-label is left"):
        second()
