"""Build the documentation site: generate the command reference, and include files of the repository outside docs/."""
