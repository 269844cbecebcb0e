"""Run a job on the engine and send its answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.types import Send

from hearth.engine import RequestOutput, SamplingParams
from hearth.errors import EngineError, RequestError
from hearth.serving.answers import Choice, Delta, Usage
from hearth.serving.http import SSE_DONE, HttpError, event, send_bytes, start_stream, to_http_error
from hearth.serving.worker.jobs import Job
from hearth.serving.worker.tokens import TokenTable
from hearth.telemetry import logs
from hearth.telemetry.metrics import EngineMetrics

log = logs.get_logger("worker")


class Generates(Protocol):
    """The part of AsyncEngine that answers requests."""

    def generate(
        self, prompt: str | list[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of all ``params.n`` sequences; closing the iterator aborts the request."""
        ...


@dataclass(slots=True)
class _Counts:
    """Tokens of a job so far."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Generation:
    """One job on its way through the engine."""

    def __init__(self, engine: Generates, job: Job, tokens: TokenTable, metrics: EngineMetrics) -> None:
        self._engine = engine
        self._job = job
        self._tokens = tokens
        self._metrics = metrics
        self._counts = _Counts(prompt=sum(map(len, job.prompts)))
        self._started = time.monotonic()
        self._num_finished = 0

    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(self._counts.prompt, self._counts.generated, self._counts.cached)

    async def respond(self, send: Send) -> None:
        """Send the answer. An error before the first byte raises; later it becomes the last event."""
        try:
            await (self._respond_stream(send) if self._job.stream else self._respond_whole(send))
        except RequestError as error:
            if error.param != "guided":
                raise
            # The engine's name for it; the client is told its own.
            raise RequestError(error.message, fix=error.fix, param=self._job.form_field) from None

    async def _respond_whole(self, send: Send) -> None:
        choices = [Choice() for _ in range(self._job.num_choices)]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.choice].add(delta)
        n = self._job.params.n
        for index, choice in enumerate(choices):  # the engine tells them once for each prompt
            choice.prompt_logprobs = choices[index - index % n].prompt_logprobs
        await send_bytes(send, 200, msgspec.json.encode(self._job.dialect.whole(choices, self.usage())))

    async def _respond_stream(self, send: Send) -> None:
        dialect, started = self._job.dialect, False
        try:
            async with aclosing(self.deltas()) as deltas:
                async for delta in deltas:
                    data = b"".join(map(event, dialect.delta(delta)))
                    if not data:
                        continue
                    if not started:
                        # Not before the first token: until then an error can still have a status of its own.
                        await start_stream(send)
                        started = True
                        data = b"".join(map(event, dialect.start(self._job.num_choices))) + data
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if not started:
                raise
            mapped = to_http_error(error)
            log.error("stream failed", extra=logs.fields(code=mapped.code, error=type(error).__name__))
            await send({"type": "http.response.body", "body": mapped.event(), "more_body": False})
            return
        usage = dialect.usage(self.usage())
        tail = (event(usage) if usage is not None else b"") + SSE_DONE
        await send({"type": "http.response.body", "body": tail, "more_body": False})

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Merge the outputs of all prompts, in the order in which they come."""
        prompts = self._job.prompts
        if len(prompts) == 1:
            async with aclosing(self._one_prompt(0)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._pump(index, queue)) for index in range(len(prompts))]
        try:
            num_open = len(tasks)
            while num_open:
                item = await queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[Delta | BaseException | None]) -> None:
        try:
            async with aclosing(self._one_prompt(index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - handed to the consumer, which raises it
            queue.put_nowait(error)

    async def _one_prompt(self, index: int) -> AsyncGenerator[Delta, None]:
        """The deltas of one prompt, measured."""
        job, n = self._job, self._job.params.n
        last: dict[int, float] = {}
        generated = dict.fromkeys(range(n), 0)
        finished: set[int] = set()
        seen = False
        outputs: Any = self._engine.generate(job.prompts[index], job.params)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    now = time.monotonic()
                    if output.finish_reason in ("error", "abort"):
                        raise _failure(output)
                    num_tokens = len(output.token_ids)
                    if not seen:
                        seen = True
                        self._counts.cached += output.num_cached_tokens
                        self._metrics.observe_first_token(
                            now - self._started,
                            num_prompt_tokens=len(job.prompts[index]),
                            num_cached_tokens=output.num_cached_tokens,
                        )
                    # Sequences that best_of dropped were computed too, and are counted as OpenAI does.
                    self._counts.generated += num_tokens + output.num_discarded_tokens
                    generated[output.index] += num_tokens
                    previous = last.get(output.index)
                    self._metrics.observe_tokens(num_tokens, None if previous is None else now - previous)
                    last[output.index] = now
                    if output.finished:
                        finished.add(output.index)
                        self._observe_end(output.finish_reason or "stop", generated[output.index])
                    yield self._delta(index * n + output.index, output)
        except Exception:
            self._observe_unfinished("error", generated, finished)
            raise
        except BaseException:  # cancelled, or closed: the client went away
            self._observe_unfinished("abort", generated, finished)
            raise

    def _delta(self, choice: int, output: RequestOutput) -> Delta:
        render = self._tokens.render
        logprobs = tuple(map(render, output.logprobs or ()))
        of_prompt = tuple(None if entry is None else render(entry) for entry in output.prompt_logprobs or ())
        return Delta(choice, output.text, len(output.token_ids), logprobs, output.finish_reason, of_prompt)

    def _observe_end(self, reason: str, num_generated: int) -> None:
        self._metrics.observe_finished(
            reason, seconds=time.monotonic() - self._started, num_generated=num_generated
        )

    def _observe_unfinished(self, reason: str, generated: dict[int, int], finished: set[int]) -> None:
        for index, count in generated.items():
            if index not in finished:
                self._observe_end(reason, count)


def _failure(output: RequestOutput) -> Exception:
    if output.finish_reason == "abort":
        return HttpError(503, "the server stopped this request", code="aborted", retry_after=1)
    return EngineError(output.error or "the request failed")
