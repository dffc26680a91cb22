"""What a run shows: metrics, FLOPs, plots, the environment report."""
