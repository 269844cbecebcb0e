"""`hearth chat`: a conversation in the terminal, with a model in this process or behind a URL."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import click

from hearth.cli.engine_options import engine_options, take_engine_options
from hearth.cli.output import note
from hearth.errors import HearthError, InputError, RequestError, ServingError

if TYPE_CHECKING:
    from hearth.engine.parsing import Event

HELP = """\
/reset          forget the conversation
/system TEXT    set the system text (and reset); without TEXT, drop it
/help           this
/exit           leave (so does Ctrl-D); Ctrl-C stops an answer"""

_REMOTE_TOKENS = 256  # of a continuation by a server, whose own default is 16 tokens

NO_TEMPLATE = "note: {} has no chat template; it continues your text instead, without memory"


class Thought(str):
    """A piece of the reasoning before an answer."""

    __slots__ = ()


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. ``None`` leaves it to the model."""

    max_tokens: int | None
    temperature: float | None
    seed: int | None


class Talker(Protocol):
    """Whoever answers. ``chats`` is whether it knows turns, or only continues a text."""

    name: str
    chats: bool

    def chat(self, messages: list[dict[str, str]], settings: Settings) -> Generator[str, None, None]:
        """The answer's pieces; those of its reasoning are Thoughts."""
        ...

    def complete(self, text: str, settings: Settings) -> Generator[str, None, None]:
        """The continuation's pieces."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class LocalTalker:
    """An engine in this process."""

    def __init__(self, reference: str, engine_options: dict[str, Any]) -> None:
        from hearth.engine import Engine
        from hearth.engine.parsing import detect_style
        from hearth.serving.worker.prompts import special_texts, template_text

        self.name = reference
        self._engine = Engine.load(reference, **engine_options)
        self._tokenizer = self._engine.tokenizer
        template = template_text(self._tokenizer)
        self.chats = bool(template)
        self._style = detect_style(template)
        special = special_texts(self._tokenizer)
        self._hides_markers = any(mark in special for mark in self._style.markers)

    def chat(self, messages: list[dict[str, str]], settings: Settings) -> Generator[str, None, None]:
        """Render the template and stream."""
        from hearth.engine.parsing import Parser
        from hearth.models import encode_chat

        prompt = encode_chat(self._tokenizer, messages)
        if self._style.reasoning is None:
            yield from self._stream(prompt, settings)
            return
        tail = str(self._tokenizer.decode(prompt[-16:], skip_special_tokens=False))
        parser = Parser.of(self._style, opened=self._style.opened_by(tail), calls=False)
        with contextlib.closing(self._stream(prompt, settings, show_markers=True)) as pieces:
            for piece in pieces:
                yield from _texts(parser.feed(piece))
        yield from _texts(parser.finish())

    def complete(self, text: str, settings: Settings) -> Generator[str, None, None]:
        """Continue ``text``."""
        yield from self._stream(text, settings)

    def _stream(
        self, prompt: str | list[int], settings: Settings, *, show_markers: bool = False
    ) -> Generator[str, None, None]:
        from hearth.engine import SamplingParams

        given: dict[str, Any] = {"temperature": settings.temperature, "seed": settings.seed}
        if show_markers and self._hides_markers:
            given["skip_special_tokens"] = False
        params = SamplingParams(
            max_tokens=settings.max_tokens,
            **{key: value for key, value in given.items() if value is not None},
        )
        with contextlib.closing(_as_generator(self._engine.stream(prompt, params))) as outputs:
            for output in outputs:
                if output.text:
                    yield output.text

    def close(self) -> None:
        """Free the model."""
        self._engine.close()


def _texts(events: Iterable[Event]) -> Iterator[str]:
    """What of a parsed answer is to be read; calls are not looked for, so there is nothing else."""
    for event in events:
        if event.text and event.kind in ("reasoning", "content"):
            yield Thought(event.text) if event.kind == "reasoning" else event.text


def _as_generator(iterator: Iterator[Any]) -> Generator[Any, None, None]:
    yield from iterator


class RemoteTalker:
    """A server with an OpenAI-compatible API, through OpenAI's own client."""

    chats = True

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        import openai

        base = url.rstrip("/")
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=base if base.endswith("/v1") else base + "/v1",
            api_key=api_key or os.environ.get("HEARTH_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none",
        )
        with self._errors(url):
            entries = list(self._client.models.list())
        known = [entry.id for entry in entries]
        if model is None:
            if len(known) != 1:
                raise ServingError(
                    f"{url} serves {', '.join(known) or 'no model'}", fix="choose one with --model NAME"
                )
            model = known[0]
        self.name = model
        # Our servers and others say how long a context is; where none is said, there is room for an answer.
        contexts = [getattr(entry, "max_model_len", None) for entry in entries if entry.id == model]
        context = next((length for length in contexts if isinstance(length, int)), 2 * _REMOTE_TOKENS)
        self._max_tokens = max(1, min(_REMOTE_TOKENS, context // 2))

    def chat(self, messages: list[dict[str, str]], settings: Settings) -> Generator[str, None, None]:
        """Stream a chat completion; falls back to plain completion when the model has no template."""
        turns: Any = messages
        with self._errors(self.name):
            try:
                stream: Any = self._client.chat.completions.create(
                    model=self.name, messages=turns, stream=True, **self._options(settings)
                )
            except self._openai.BadRequestError as error:
                if error.code != "no_chat_template":
                    raise
                self.chats = False
                raise NoTemplateError(str(self.name)) from None
            with contextlib.closing(stream):
                for chunk in stream:
                    if not chunk.choices:
                        continue
                    delta = chunk.choices[0].delta
                    # As Hearth and vLLM say it, and others; OpenAI's own client has no name for it.
                    thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
                    if isinstance(thought, str) and thought:
                        yield Thought(thought)
                    if delta.content:
                        yield delta.content

    def complete(self, text: str, settings: Settings) -> Generator[str, None, None]:
        """Stream a completion."""
        options = self._options(settings)
        options.setdefault("max_tokens", self._max_tokens)
        with self._errors(self.name):
            stream: Any = self._client.completions.create(
                model=self.name, prompt=text, stream=True, **options
            )
            with contextlib.closing(stream):
                for chunk in stream:
                    if chunk.choices and chunk.choices[0].text:
                        yield chunk.choices[0].text

    @staticmethod
    def _options(settings: Settings) -> dict[str, Any]:
        return {key: value for key, value in vars(settings).items() if value is not None}

    @contextlib.contextmanager
    def _errors(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except self._openai.APIConnectionError as error:
            raise ServingError(f"cannot reach {what}: {error}", fix="is the server running?") from error
        except self._openai.AuthenticationError as error:
            raise ServingError(
                f"{what} wants an API key: {error.message}", fix="give --api-key, or set HEARTH_API_KEY"
            ) from error
        except self._openai.BadRequestError as error:
            raise RequestError(error.message, param=error.param) from error
        except self._openai.APIError as error:
            raise ServingError(f"{what}: {error.message}") from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class NoTemplateError(RequestError):
    """The model cannot chat; raised once, before the fall-back to completion."""


@dataclass
class Conversation:
    """What was said, and who answers. ``turn`` yields the pieces of one answer."""

    talker: Talker
    settings: Settings
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self, system: str | None) -> None:
        """Forget what was said."""
        self.system = system
        self.messages.clear()

    def turn(self, text: str) -> Generator[str, None, None]:
        """Say ``text``; an answer that was stopped midway stays in the history as far as it went."""
        if not self.talker.chats:
            yield from self.talker.complete(text, self.settings)
            return
        said = {"role": "user", "content": text}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        pieces: list[str] = []
        try:
            for piece in self.talker.chat([*opening, *self.messages, said], self.settings):
                if not isinstance(piece, Thought):
                    pieces.append(piece)
                yield piece
        except NoTemplateError:
            note(NO_TEMPLATE.format(self.talker.name))
            yield from self.talker.complete(text, self.settings)
            return
        finally:
            if pieces:
                self.messages += [said, {"role": "assistant", "content": "".join(pieces)}]


@click.command()
@click.argument("model", required=False)
@click.option("--url", help="Talk to a running server instead, such as http://127.0.0.1:8000.")
@click.option("--model", "remote_model", help="With --url: the model's name there, if it serves several.")
@click.option("--api-key", help="With --url: the key. Default: $HEARTH_API_KEY.")
@click.option("--system", help="A system text before the conversation.")
@click.option("--max-tokens", type=int, help="Longest answer.  [default: what the context leaves]")
@click.option("--temperature", type=float, help="0 takes the likeliest token.  [default: 0.7]")
@click.option("--seed", type=int, help="Makes answers reproducible.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an answer; notes go to stderr.")
def chat(
    model: str | None,
    url: str | None,
    remote_model: str | None,
    api_key: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Talk to MODEL (name, name@version, directory, hf:org/name), or to a server with --url.

    Reasoning is shown on standard error, dimmed on a terminal; the conversation remembers the answers only.
    --dtype and the other settings of the engine go with MODEL.

    Type /help for commands. With input from a pipe each line is one turn:
    printf 'Hello\\nAnd you?\\n' | hearth chat MODEL
    """
    if (model is None) == (url is None):
        raise click.UsageError("give a MODEL or --url URL, one of the two")
    engine_settings = take_engine_options(options)
    if url is not None and engine_settings != {"dtype": "auto"}:
        raise click.UsageError(f"--url: {', '.join(engine_settings)} is for the server to set")
    settings = Settings(max_tokens, 0.7 if temperature is None else temperature, seed)
    talker: Talker
    if url is not None:
        talker = RemoteTalker(url, remote_model, api_key)
    else:
        assert model is not None
        talker = LocalTalker(model, {**engine_settings, "max_num_seqs": 1})
    try:
        if not talker.chats:
            note(NO_TEMPLATE.format(talker.name))
        _talk(Conversation(talker, settings, system), as_json=as_json, interactive=sys.stdin.isatty())
    finally:
        talker.close()


def _talk(conversation: Conversation, *, as_json: bool, interactive: bool) -> None:
    """Read turns until the end of input. In a pipe an error ends it; in a terminal one may go on."""
    if interactive:
        note(f"talking to {conversation.talker.name}; /help shows the commands")
    while True:
        line = _read_line(interactive)
        if line is None:
            return
        text = line.strip()
        if not text:
            continue
        if text.startswith("/"):
            if text.split()[0] == "/exit":
                return
            _command(conversation, text)
            continue
        try:
            _answer(conversation, text, as_json=as_json)
        except HearthError as error:
            if not interactive:
                raise
            note(f"error: {error}")


def _read_line(interactive: bool) -> str | None:
    """The next line, or None at the end of input."""
    if not interactive:
        try:
            return sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _command(conversation: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name == "/reset":
        conversation.reset(conversation.system)
        note("the conversation starts anew")
    elif name == "/system":
        conversation.reset(rest.strip() or None)
        note("system text set" if conversation.system else "no system text")
    elif name == "/help":
        note(HELP)
    else:
        note(f"no command {name}; /help shows them")


def _answer(conversation: Conversation, text: str, *, as_json: bool) -> None:
    pieces: list[str] = []
    thoughts: list[str] = []
    stopped = False
    with contextlib.closing(conversation.turn(text)) as answer:
        try:
            for piece in answer:
                if not as_json:
                    _show(piece, ends_thoughts=bool(thoughts) and not pieces)
                (thoughts if isinstance(piece, Thought) else pieces).append(piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stopped = True
    if as_json:
        whole = {"prompt": text, "text": "".join(pieces), "model": conversation.talker.name}
        if thoughts:
            whole["reasoning"] = "".join(thoughts)
        click.echo(json.dumps(whole, ensure_ascii=False))
    else:
        click.echo(" [stopped]" if stopped else "")
    if thoughts and not pieces and not stopped:
        note("it ended within its reasoning, and is not remembered; --max-tokens allows more")


def _show(piece: str, *, ends_thoughts: bool) -> None:
    """Write a piece: the answer to standard output, its reasoning to standard error."""
    if isinstance(piece, Thought):
        click.secho(str(piece), nl=False, err=True, dim=True)
        return
    if ends_thoughts:
        note("")
    click.echo(piece, nl=False)
