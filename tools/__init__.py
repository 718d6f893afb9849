"""Tools for working on batch-infer; not part of the package."""
