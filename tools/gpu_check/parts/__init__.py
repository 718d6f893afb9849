"""Parts of the check. Each module has a function `run(recorder)`, which runs in a separate process."""
