"""Files, machines, progress bars and statistics: what knows nothing of detectors."""
