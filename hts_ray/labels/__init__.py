"""From a teacher's regional scores to pseudo-labels."""
