"""The parts of the check. Each module has a function `run(recorder)` and is started in a process of its own."""
