"""`adapter completion`: the script that a shell needs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(adapter completion bash)"     in ~/.bashrc
    zsh:   eval "$(adapter completion zsh)"      in ~/.zshrc
    fish:  adapter completion fish > ~/.config/fish/completions/adapter.fish
    """
    from . import adapter

    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(adapter, {}, "adapter", "_ADAPTER_COMPLETE").source())
