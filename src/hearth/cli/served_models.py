"""`hearth models load`, `reload` and `unload`: what a running server serves."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hearth.cli.output import note, print_json
from hearth.errors import ConflictError, HearthError, InputError, NotFoundError, ServingError

_ERRORS: dict[int, type[HearthError]] = {
    400: InputError, 401: InputError, 403: InputError, 404: NotFoundError, 409: ConflictError
}  # fmt: skip
_URL = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The running server.")
_KEY = click.option(
    "--admin-key", envvar="HEARTH_SERVE__ADMIN_KEY",
    help="The server's admin_key. $HEARTH_SERVE__ADMIN_KEY shows in no process list.",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print only JSON.")


def _remote(function: Callable[..., None]) -> Callable[..., None]:
    return _URL(_KEY(_JSON(function)))


@click.command()
@click.argument("model", metavar="[NAME=]MODEL")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="As in `models` of a server's file."
)
@_remote
def load(model: str, settings: tuple[str, ...], url: str, admin_key: str | None, as_json: bool) -> None:
    """Load MODEL into a running server, or replace the one of its name without a gap."""
    from hearth.config.sources import parse_scalar

    name, equals, reference = model.partition("=")
    body: dict[str, Any] = {"model": reference, "name": name} if equals and name else {"model": model}
    path = Path(body["model"]).expanduser()
    if (path / "config.json").is_file():
        body["model"] = str(path.absolute())  # the server may run in another directory
    for each in settings:
        key, separator, value = each.partition("=")
        if not separator:
            raise click.UsageError(f"--set {each!r}: give KEY=VALUE")
        body[key] = parse_scalar(value)
    _show(_post(url, "/models/load", body, admin_key), as_json)


@click.command()
@click.argument("name")
@_remote
def reload(name: str, url: str, admin_key: str | None, as_json: bool) -> None:
    """Load NAME of a running server again: what its alias means now."""
    _show(_post(url, "/models/reload", {"name": name}, admin_key), as_json)


@click.command()
@click.argument("name")
@_remote
def unload(name: str, url: str, admin_key: str | None, as_json: bool) -> None:
    """Take NAME out of a running server, after its open requests, and free its memory."""
    _show(_post(url, "/models/unload", {"name": name}, admin_key), as_json)


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    elif answer["state"] == "unloaded":
        note(f"unloaded {answer['name']!r}")
    else:
        note(f"serving {answer['version']} as {answer['name']!r}")


def _post(url: str, path: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The answer; it comes when the work is done, however long the model takes to load."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url!r} is no address", fix="give http://HOST:PORT")
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url.rstrip("/") + path, json.dumps(body).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request) as response:  # noqa: S310 - checked above
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{url} answers {error.code}; is it a Hearth server?"
        fix = "give --admin-key, or set HEARTH_SERVE__ADMIN_KEY" if error.code == 401 else None
        raise _ERRORS.get(error.code, ServingError)(message, fix=fix) from None
    except urllib.error.URLError as error:
        raise ServingError(
            f"no answer from {url}: {error.reason}", fix="start it with `hearth serve`"
        ) from None
    except (OSError, ValueError) as error:
        raise ServingError(f"no whole answer from {url}: {error}") from None
