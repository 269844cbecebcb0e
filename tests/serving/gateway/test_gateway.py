"""The gateway against scripted workers: forwarding, routing, limits, and every way a worker can fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hearth.errors import ServingError, StorageError
from hearth.serving.gateway import app
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.policy import RestartPolicy
from hearth.telemetry import names


async def until_cancelled(running, scripts: set[str]) -> None:
    """Wait until the worker has stopped working on ``scripts``."""
    async with asyncio.timeout(10):
        while True:
            _, stats = await running.get("/stats")
            if set(stats["models"]["scripted"]["worker"]["cancelled"]) == scripts:
                return
            await asyncio.sleep(0.02)


async def test_bytes_and_headers_are_forwarded(start_gateway) -> None:
    async with start_gateway() as running:
        async with running.session.post(
            running.url + "/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "mine-1"}
        ) as response:
            body = await response.json()
            assert (response.status, body["text"], body["id"]) == (200, "hi", "mine-1")
            assert response.headers["x-request-id"] == "mine-1"
            assert response.headers["x-hearth-model"] == "scripted@1"
        status, body, _ = await running.post("/chat", prompt="refuse")
        assert (status, body["error"]["message"]) == (400, "no")


async def test_a_request_id_that_is_no_plain_word_is_replaced(start_gateway) -> None:
    async with start_gateway() as running:
        for bad in ("a b", "x" * 200, 'say "hi"'):
            async with running.session.get(running.url + "/livez", headers={"x-request-id": bad}) as response:
                assert response.headers["x-request-id"] != bad
                assert len(response.headers["x-request-id"]) == 32


async def test_a_stream_is_forwarded_whole(start_gateway) -> None:
    async with start_gateway() as running:
        async with running.session.post(
            running.url + "/v1/completions", json={"prompt": "stream"}
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            text = (await response.read()).decode()
        assert text.count("data: ") == 4
        assert text.endswith("data: [DONE]\n\n")


async def test_models_are_found_by_each_of_their_names(start_gateway, worker_spec) -> None:
    async with start_gateway(worker_spec("first"), worker_spec("second")) as running:
        for name in ("second", "second@1", "second@production"):
            status, _, headers = await running.post(prompt="hi", model=name)
            assert (status, headers["x-hearth-model"]) == (200, "second@1")
        status, body, _ = await running.post(prompt="hi")
        assert (status, body["error"]["param"]) == (400, "model")
        status, body, _ = await running.post(prompt="hi", model="third")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "first, second" in body["error"]["message"]
        _, models = await running.get("/v1/models")
        assert [model["id"] for model in models["data"]] == ["first", "second"]
        status, model = await running.get("/v1/models/first@production")
        assert (status, model["root"]) == (200, "first@1")
        assert (await running.get("/v1/models/third"))[0] == 404


async def test_bad_bodies_do_not_reach_a_worker(start_gateway) -> None:
    async with start_gateway() as running:
        url = running.url + "/v1/completions"
        json_type = {"content-type": "application/json"}
        cases = [
            (b"{", json_type, 400, "not valid JSON"),
            (b"", json_type, 400, "empty"),
            (b"[]", json_type, 400, "expected `object`"),
            (b"{}", {"content-type": "text/plain"}, 400, "text/plain"),
            (b"x" * 20_000, json_type, 413, "larger than 10000 bytes"),
        ]
        for body, headers, status, says in cases:
            async with running.session.post(url, data=body, headers=headers) as response:
                error = (await response.json())["error"]
                assert response.status == status, says
                assert says in error["message"]

        async def endless():
            for _ in range(100):
                yield b"x" * 1000

        async with running.session.post(url, data=endless(), headers=json_type) as response:
            assert response.status == 413


async def test_unknown_paths_and_methods_have_openai_errors(start_gateway) -> None:
    async with start_gateway() as running:
        status, body = await running.get("/v1/nothing")
        assert (status, body["error"]["code"]) == (404, "not_found")
        status, body = await running.get("/v1/completions")
        assert (status, body["error"]["code"]) == (405, "method_not_allowed")


async def test_keys_guard_everything_but_probes(start_gateway) -> None:
    async with start_gateway(access=Access(["secret-key-1"])) as running:
        for path in ("/livez", "/readyz", "/metrics"):
            async with running.session.get(running.url + path) as response:
                assert response.status == 200, path
        for path in ("/v1/models", "/models", "/stats", "/health", "/nothing"):
            status, body = await running.get(path)
            assert (status, body["error"]["code"]) == (401, "missing_api_key"), path
        status, body, headers = await running.post(prompt="hi")
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        running.session.headers["authorization"] = "Bearer secret-key-1"
        assert (await running.post(prompt="hi"))[0] == 200


async def test_a_full_queue_is_429(start_gateway) -> None:
    async with start_gateway(max_queue=1) as running:  # and one that runs
        tasks = [asyncio.create_task(running.post(prompt="sleep")) for _ in range(2)]
        await running.until(lambda: running.gateway.num_open == 2)
        status, body, headers = await running.post(prompt="hi")
        assert (status, body["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await running.until(lambda: running.gateway.num_open == 0)
        assert (await running.post(prompt="hi"))[0] == 200


async def test_the_queue_counts_sequences(start_gateway) -> None:
    async with start_gateway(max_queue=3) as running:  # and one that runs
        assert (await running.post(prompt="hi", n=5))[0] == 200  # alone: later it would fit no better
        task = asyncio.create_task(running.post(prompt="sleep"))
        await running.until(lambda: running.gateway.in_flight == {"scripted": 1})
        for body in ({"prompt": "hi", "n": 4}, {"prompt": ["hi", "ho"], "best_of": 2}, {"input": ["a"] * 4}):
            status, answer, _ = await running.post(**body)
            assert (status, answer.get("error", {}).get("code")) == (429, "rate_limit_exceeded"), (
                body,
                answer,
            )
        assert (await running.post(prompt="hi", n=3))[0] == 200
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_body_that_drips_is_given_up(start_gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "read_json_body", partial(app.read_json_body, seconds=0.2))

    async def drip():
        for _ in range(50):
            yield b" "
            await asyncio.sleep(0.05)

    async with start_gateway() as running:
        json_type = {"content-type": "application/json"}
        url = running.url + "/v1/completions"
        async with running.session.post(url, data=drip(), headers=json_type) as response:
            assert response.status == 408
            assert (await response.json())["error"]["code"] == "request_timeout"
        assert (await running.post(prompt="hi"))[0] == 200


async def test_a_request_that_takes_too_long_is_504(start_gateway) -> None:
    async with start_gateway(request_timeout=0.3) as running:
        status, body, _ = await running.post(prompt="sleep")
        assert (status, body["error"]["code"]) == (504, "request_timeout")
        text = await running.read(prompt="stream-sleep")
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "request_timeout"
        assert "[DONE]" not in text
        await until_cancelled(running, {"sleep", "stream-sleep"})


async def test_a_client_that_leaves_stops_the_work(start_gateway) -> None:
    async with start_gateway() as running:
        for script in ("sleep", "stream-sleep"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(running.read(prompt=script), 0.3)
        await running.until(lambda: running.gateway.num_open == 0)
        await until_cancelled(running, {"sleep", "stream-sleep"})


async def test_a_worker_that_dies_before_the_first_byte_is_503_and_replaced(start_gateway) -> None:
    async with start_gateway() as running:
        (worker,) = running.gateway.workers
        first = worker.pid
        status, body, headers = await running.post(prompt="die")
        assert (status, body["error"]["code"]) == (503, "worker_failed")
        assert "retry-after" in headers
        await running.until(lambda: worker.state == "ready" and worker.pid != first)
        assert (await running.post(prompt="hi"))[0] == 200
        assert worker.restarts == 1


@pytest.mark.parametrize("script", ["stream-die", "stream-half"])
async def test_a_worker_that_dies_in_a_stream_ends_it_with_an_error(start_gateway, script: str) -> None:
    async with start_gateway() as running:
        async with running.session.post(running.url + "/v1/completions", json={"prompt": script}) as response:
            assert response.status == 200
            text = (await response.read()).decode()
        events = [event for event in text.split("\n\n") if event]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "worker_failed"
        assert "[DONE]" not in text


async def test_a_death_after_the_end_is_no_error_of_the_answer(start_gateway) -> None:
    async with start_gateway() as running:
        text = await running.read(prompt="stream-done-die")
        assert text.endswith("data: [DONE]\n\n")
        assert "error" not in text


async def test_a_worker_that_hangs_is_replaced(start_gateway, worker_spec) -> None:
    async with start_gateway(worker_spec(health_timeout=0.5)) as running:
        (worker,) = running.gateway.workers
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        status, body, _ = await asyncio.wait_for(running.post(prompt="hi"), 20)
        assert (status, body["error"]["code"]) == (503, "worker_failed")
        await running.until(lambda: worker.state == "ready" and worker.pid != first)
        assert (await running.post(prompt="hi"))[0] == 200


@pytest.mark.parametrize("script", ["engine-dies", "stream-engine-dies"])
async def test_a_dead_engine_is_seen_at_once(start_gateway, worker_spec, script: str) -> None:
    """Not at the next check, which is far away: until then others would be sent to it."""
    async with start_gateway(worker_spec(health_interval=600.0)) as running:
        (worker,) = running.gateway.workers
        first = worker.pid
        assert "no" in await running.read(prompt=script)
        await running.until(lambda: worker.pid not in (None, first) and worker.state == "ready")
        assert (await running.post(prompt="hi"))[0] == 200


async def test_it_gives_up_on_a_worker_that_keeps_failing_and_still_answers(
    start_gateway, worker_spec, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    arguments = ("--count-file", str(count), "--fail-from", "1")
    policy = RestartPolicy(backoff=0.4, limit=3)
    async with start_gateway(worker_spec(arguments=arguments, policy=policy)) as running:
        (worker,) = running.gateway.workers
        assert (await running.get("/readyz"))[0] == 200
        await running.post(prompt="die")
        await running.until(lambda: worker.state != "ready")
        status, body, headers = await running.post(prompt="hi")
        assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert "retry-after" in headers
        assert (await running.get("/readyz"))[0] == 503
        await running.until(lambda: worker.state == "failed")
        assert len(count.read_text().splitlines()) == 3
        status, body, _ = await running.post(prompt="hi")
        assert (status, body["error"]["code"]) == (503, "model_failed")
        status, health = await running.get("/health")
        assert (status, health["status"]) == (503, "down")
        assert "exit code 3" in health["models"]["scripted"]["problem"]
        assert (await running.get("/livez"))[0] == 200


async def test_a_first_start_that_fails_is_an_error_of_the_start(
    start_gateway, worker_spec, tmp_path
) -> None:
    arguments = ("--count-file", str(tmp_path / "count"), "--fail-from", "0")
    with pytest.raises(ServingError, match="exit code 3"):
        async with start_gateway(worker_spec(arguments=arguments)):
            pass


async def test_a_program_that_cannot_be_run_is_an_error_of_the_start(start_gateway, worker_spec) -> None:
    with pytest.raises(ServingError, match="no/such/program"):
        async with asyncio.timeout(10), start_gateway(worker_spec(command=("/no/such/program",))):
            pass


async def test_models_of_like_names_have_workers_of_their_own(start_gateway, worker_spec) -> None:
    models = [f"a-name-that-is-long-and-goes-on-{i}" for i in range(2)]
    async with start_gateway(*map(worker_spec, models)) as running:
        _, stats = await running.get("/stats")
        for name in models:
            model = stats["models"][name]
            assert model["worker"]["pid"] == model["pid"]


async def test_keys_that_cannot_be_checked_are_an_error_and_not_a_pass(start_gateway) -> None:
    def verify(_: str) -> bool:
        raise StorageError("the database is locked")

    async with start_gateway(access=Access(verify=verify)) as running:
        headers = {"authorization": "Bearer hk-some-key"}
        async with running.session.get(running.url + "/v1/models", headers=headers) as response:
            assert response.status == 500
            assert (await response.json())["error"]["type"] == "server_error"


async def test_a_model_may_have_a_name_of_any_script(start_gateway, worker_spec) -> None:
    async with start_gateway(worker_spec("模型")) as running:
        status, body, headers = await running.post(prompt="hi", model="模型")
        assert (status, body["text"]) == (200, "hi")
        assert headers["x-hearth-model"] == "%E6%A8%A1%E5%9E%8B@1"


async def test_draining_refuses_new_requests_and_aborting_ends_open_ones(start_gateway) -> None:
    async with start_gateway() as running:
        open_request = asyncio.create_task(running.post(prompt="sleep"))
        await running.until(lambda: running.gateway.num_open == 1)
        running.gateway.draining = True
        assert (await running.get("/readyz"))[0] == 503
        status, body, _ = await running.post(prompt="hi")
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        running.gateway.abort_all()
        status, body, _ = await open_request
        assert (status, body["error"]["code"]) == (503, "shutting_down")


async def test_metrics_join_gateway_and_workers(start_gateway) -> None:
    async with start_gateway() as running:
        await running.post(prompt="hi")
        await running.post(prompt="hi", model="nobody" * 10)
        async with running.session.get(running.url + "/metrics") as response:
            text = await response.text()
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    route = ("route", "/v1/completions")
    requests = names.GATEWAY_REQUESTS + "_total"
    assert values[requests, (("model", "scripted"), route, ("status", "200"))] == 1
    assert values[requests, (("model", "-"), route, ("status", "404"))] == 1
    assert values[names.GATEWAY_WORKER_UP, (("model", "scripted"),)] == 1
    assert values["scripted", (("model", "scripted"),)] == 1
    assert "nobody" not in text


async def test_browsers_of_allowed_origins_may_call(start_gateway) -> None:
    async with start_gateway(
        access=Access(["secret-key-1"]), cors_origins=("https://ui.example",)
    ) as running:
        headers = {"origin": "https://ui.example", "access-control-request-method": "POST"}
        async with running.session.options(running.url + "/v1/completions", headers=headers) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "https://ui.example"
        async with running.session.options(
            running.url + "/v1/completions", headers={**headers, "origin": "https://evil.example"}
        ) as response:
            assert "access-control-allow-origin" not in response.headers


async def test_a_connection_refused_is_not_left_open(start_gateway) -> None:
    async with start_gateway() as running:
        url = running.url
    with pytest.raises(aiohttp.ClientConnectorError):
        async with aiohttp.ClientSession() as session:
            await session.get(url + "/livez")
