"""`hearth VERB …`: the verbs, loaded lazily, and the one place where errors become exit codes.

Help lists every verb from the table below without importing it, so `hearth --help` loads no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from hearth.errors import HearthError, LostProcessError
from hearth.threads import limit_spinning
from hearth.version import __version__

# verb -> (module:attribute, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("hearth.cli.demo:demo", "Raw text to an answering endpoint, in minutes, offline."),
    "data": ("hearth.cli.data:data", "Prepare and inspect datasets."),
    "plan": ("hearth.cli.plan:plan", "Layout, memory and time of a recipe on many devices."),
    "train": ("hearth.cli.train:train", "Train a model from a recipe."),
    "launch": ("hearth.cli.launch:launch", "Start a recipe on many processes, here or on a cluster."),
    "eval": ("hearth.cli.evaluate:evaluate", "Measure a model: perplexity and bits per byte."),
    "parity": ("hearth.cli.parity:parity", "Check that serving answers the same as training."),
    "models": ("hearth.cli.models:models", "List, show, promote, verify, import and export versions."),
    "runs": ("hearth.cli.runs:runs", "List, show and compare runs."),
    "lineage": ("hearth.cli.lineage:lineage", "What something was made from, and what was made from it."),
    "serve": ("hearth.cli.serve:serve", "Serve a model over an OpenAI-compatible endpoint."),
    "chat": ("hearth.cli.chat:chat", "Talk to a model in the terminal."),
    "generate": ("hearth.cli.generate:generate", "Complete one prompt."),
    "keys": ("hearth.cli.keys:keys", "Create, list and revoke API keys."),
    "config": ("hearth.cli.config:config", "Show a recipe with the source of each value, or its schema."),
    "doctor": ("hearth.cli.doctor:doctor", "What this machine has and what Hearth will use."),
}


class LazyGroup(click.Group):
    """A command group whose members are imported when they are invoked, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module_name, attribute = VERBS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hearth")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Hearth takes a language model from raw text to a monitored endpoint, and back.

    Start with `hearth demo`. Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line; turn every HearthError into a message on stderr and its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    limit_spinning(os.environ)
    try:
        sys.exit(cli.main(arguments, standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except HearthError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"error: {error}", err=True)
        if isinstance(error, LostProcessError):
            _end_at_once(error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe went away (`hearth runs list | head`): nothing is wrong on our side.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        # What the system refuses, such as a file without permission, is no bug of ours.
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        sys.exit(1)


def _end_at_once(code: int) -> None:
    """End without the destructors of groups and threads, which would wait for a process that is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
