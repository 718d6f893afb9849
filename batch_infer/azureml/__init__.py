"""Azure ML's doors: the scripts that its batch and real-time endpoints run."""
