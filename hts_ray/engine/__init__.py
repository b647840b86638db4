"""The Ray side that stages share: joining a cluster, the pass over images, progress, metrics."""
