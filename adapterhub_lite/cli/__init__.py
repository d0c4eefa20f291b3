"""The command `adapter`. One file a command group, imported when it is called."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .._version import __version__
from ..errors import AdapterError, printable
from ..registry import registry, use_plugins_dir

# Name -> (module, one line for --help). Nothing is imported to print the help.
COMMANDS = {
    "methods": ("methods", "Plugins found: methods, what they can do, where they come from."),
    "rules": ("rules", "Merge rules found, and their options."),
    "info": ("info", "What an adapter is: method, base, rank, sites, size, how it was made."),
    "pull": ("pull", "An adapter from the Hub, every file verified; a lock file of what it was."),
    "merge": ("merge", "Adapters into one: the exact weighted sum or another rule, whole or truncated."),
    "tune": ("tune", "Weights for a merge, searched by a score of yours; nothing is trained."),
    "reproduce": ("reproduce", "A merge done again from the recipe in its output, and compared bit by bit."),
    "diff": ("diff", "How like adapters are: norms, cosine, overlap, spectra; an HTML page."),
    "resize": ("resize", "One adapter, at a lower rank, error, size or precision."),
    "extract": ("extract", "A LoRA from a full fine-tune: what its weights differ by from the base's."),
    "verify": ("verify", "Whether an output is what was written, and what its recipe gives."),
    "compile": ("compile", "A composition, sums and chains of adapters, into one plain LoRA."),
    "convert": ("convert", "A folder of another dialect, AdapterHub's say, in PEFT's layout."),
    "search": ("search", "Adapters on the Hub for a base model, by what their headers say."),
    "push": ("push", "A folder to the Hub, as one commit: checked, searched for leaks, with its card."),
    "plugin": ("plugin", "Write a plugin package, and check it."),
    "demo": ("demo", "Train two adapters on a small model, merge them, look at what happened."),
    "completion": ("completion", "Shell completion for bash, zsh or fish."),
}


COMPLETING = "_ADAPTER_COMPLETE"
INTERRUPTED = 130  # 128 + SIGINT, as shells count
LONGEST = 1000  # characters of a message


class Commands(click.Group):
    """Commands by name, bundled ones and those of plugins, none imported before it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(registry().commands().keys() - COMMANDS.keys())]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            module = importlib.import_module(f".{COMMANDS[name][0]}", __name__)
            command: click.Command = getattr(module, name)
            return command
        load = registry().commands().get(name)
        return None if load is None else load()

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        rows += [(name, "(from a plugin)") for name in self.list_commands(ctx) if name not in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from ..errors import nearest

        name = args[0]
        if self.get_command(ctx, name) is None:
            ctx.fail(f"no such command {printable(name)!r}; {nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adapter")
@click.option(
    "--plugins-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="Also load the plugin files in this folder.",
)
def adapter(plugins_dir: Sequence[Path]) -> None:
    """Adapters as files: look at them, merge them exactly, extend the methods with plugins.

    REF is an adapter folder, adapter_config.json beside adapter_model.safetensors, or one on the Hub:
    owner/name[@revision][:subfolder].
    """
    for folder in plugins_dir:
        use_plugins_dir(folder)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; exit 0 when done, 2 on wrong usage, 1 when refused or failed, 130 on an interrupt."""
    gc.set_threshold(100_000)  # importing torch makes many objects that stay: looking through them takes 0.3 s
    code = run(args)
    if code == INTERRUPTED:  # at once: a thread that the interrupt left without its lock would be waited for
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # else the interpreter, as it ends, looks through all that torch has made: half a second
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """As `main`, but return the exit code."""
    try:
        if COMPLETING in os.environ:  # the shell asks
            adapter.main(args, prog_name="adapter")
        # As adapter.main does, which prints an empty line when it is interrupted.
        with adapter.make_context("adapter", list(sys.argv[1:] if args is None else args)) as ctx:
            code: Any = adapter.invoke(ctx)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt) as e:
        click.echo(f"adapter: interrupted; {e}" if str(e) else "adapter: interrupted", err=True)
        return INTERRUPTED
    except AdapterError as e:
        return _failed(str(e))
    except BrokenPipeError:  # the reader of our output has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _failed("out of memory; close something, or merge fewer adapters at once")
    except RecursionError:
        return _failed("something is nested too deeply; look for a file that nobody would write by hand")
    except OSError as e:
        return _failed(f"{printable(str(e.filename))}: {e.strerror}" if e.filename else str(e))


def _failed(text: str) -> int:
    if len(text) > LONGEST:  # a stranger's file can have a name of megabytes
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    click.echo(f"adapter: {text}", err=True)
    return 1
