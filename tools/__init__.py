"""Tools for the project's maintainers; none of them is installed with the package."""
