"""Tools for the project's maintainers. They are not installed with the package."""
