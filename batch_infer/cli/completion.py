"""The command that prints the completion script of a shell."""

from __future__ import annotations

import os
from pathlib import PurePath

import click
from click.shell_completion import get_completion_class

from batch_infer.cli.options import command
from batch_infer.cli.shells import COMPLETE_VARIABLE

SHELLS = ("bash", "zsh", "fish")


@command(click.Argument(["shell"], metavar="[bash|zsh|fish]", type=click.Choice(SHELLS), required=False))
def completion(*, shell: str | None, quiet: bool) -> int:
    """Print the script with which a shell completes commands, options and files.

    The default is the shell of the variable SHELL. Write the script once to where the shell looks for it, and again
    after an update of batch-infer. New sessions then complete `batch-infer`.

    \b
    bash, with the package bash-completion:
      batch-infer completion bash > ~/.local/share/bash-completion/completions/batch-infer
    zsh, with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc:
      batch-infer completion zsh > ~/.zfunc/_batch-infer
    fish:
      batch-infer completion fish > ~/.config/fish/completions/batch-infer.fish

    Create missing folders first. For this session of bash or zsh only: source <(batch-infer completion)

    Exit codes: 0 success; 2 usage, or SHELL names another shell.
    """
    name = shell or PurePath(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise click.UsageError(f"the variable SHELL names no shell that can complete: give one of {', '.join(SHELLS)}")
    root = click.get_current_context().find_root()
    script = get_completion_class(name)
    if script is not None:  # printed with -q too: the script is the result
        click.echo(script(root.command, {}, "batch-infer", COMPLETE_VARIABLE).source())
    return 0
