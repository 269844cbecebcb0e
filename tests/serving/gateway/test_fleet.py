"""Models that come and go under load, with scripted workers in processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from hearth.serving.gateway.access import Access
from hearth.serving.gateway.fleet import Limits
from hearth.serving.http import HttpError

LOAD, RELOAD, UNLOAD = "/models/load", "/models/reload", "/models/unload"


def worker_processes() -> list[int]:
    """Children of this process that are scripted workers and live."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and any(
                "scripted_worker" in x for x in child.cmdline()
            ):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


async def rows(running) -> list[tuple[str, str, str]]:
    _, body = await running.get("/models")
    return [(row["name"], row["version"], row["state"]) for row in body["models"]]


def says(answer) -> tuple[int, str | None]:
    status, body, *_ = answer
    return status, body["error"]["code"] if "error" in body else None


async def test_a_model_comes_and_goes(start_fleet, script) -> None:
    scripts = {"one": script("one@1"), "two": script("two@1")}
    async with start_fleet(scripts, "one") as running:
        assert says(await running.post(model="two", prompt="hi")) == (404, "model_not_found")
        status, body, _ = await running.post(LOAD, model="two")
        assert (status, body["name"], body["version"], body["state"]) == (200, "two", "two@1", "ready")
        _, _, headers = await running.post(model="two", prompt="hi")
        assert headers["x-hearth-model"] == "two@1"
        assert len(worker_processes()) == 2
        pid = running.gateway.route("two").pid
        status, body, _ = await running.post(UNLOAD, name="two@1")  # any of its names will do
        assert (status, body) == (200, {"name": "two", "state": "unloaded"})
        assert not psutil.pid_exists(pid)
        assert says(await running.post(model="two", prompt="hi")) == (404, "model_not_found")
        assert await rows(running) == [("one", "one@1", "ready")]
        assert (await running.post(UNLOAD, name="one"))[0] == 200
        assert (await running.get("/readyz"))[0] == 503
        assert says(await running.post(prompt="hi")) == (400, "missing_required_parameter")
        assert (await running.get("/v1/models"))[1]["data"] == []
        assert (await running.post(LOAD, model="one"))[0] == 200
        assert (await running.get("/readyz"))[0] == 200
    assert worker_processes() == []


async def test_a_replacement_has_no_gap(start_fleet, script, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    scripts = {"m:a": script("m@1"), "m:b": script("m@2", ("--wait-for", str(gate)))}
    async with start_fleet(scripts, "m:a") as running:
        served: list[tuple[int, str]] = []
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                status, _, headers = await running.post(model="m", prompt="hi")
                served.append((status, headers.get("x-hearth-model")))

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        long = asyncio.create_task(running.read(model="m", prompt="stream"))
        loading = asyncio.create_task(running.post(LOAD, model="m:b"))
        await running.until(lambda: running.gateway.fleet.is_loading("m"))
        assert await rows(running) == [("m", "m@1", "ready"), ("m", "m@2", "loading")]
        assert says(await running.post(LOAD, model="m:b")) == (409, "already_loading")
        gate.touch()
        assert (await loading)[0] == 200
        seen = len(served)
        await running.until(lambda: len(served) > seen + 20)
        done.set()
        await asyncio.gather(*asking)
        assert {status for status, _ in served} == {200}
        versions = [version for _, version in served]
        assert set(versions) == {"m@1", "m@2"}
        assert set(versions[seen + 8 :]) == {"m@2"}
        assert "[DONE]" in await long
        await running.until(lambda: len(worker_processes()) == 1)
        assert await rows(running) == [("m", "m@2", "ready")]


async def test_a_load_that_fails_changes_nothing_and_says_why(start_fleet, script) -> None:
    scripts = {"m:a": script("m@1"), "m:b": script("m@2", ("--fail-with", "no weights"))}
    scripts["new"] = script("new@1", ("--fail-with", "no weights either"))
    async with start_fleet(scripts, "m:a") as running:
        pid = running.gateway.route("m").pid
        for reference in ("m:b", "new"):
            status, body, _ = await running.post(LOAD, model=reference)
            assert (status, body["error"]["code"]) == (400, "load_failed")
            assert "no weights" in body["error"]["message"]
            assert "mend it" in body["error"]["message"]
        assert running.gateway.route("m").pid == pid
        assert (await running.post(model="m", prompt="hi"))[0] == 200
        assert says(await running.post(model="new", prompt="hi")) == (404, "model_not_found")
        assert worker_processes() == [pid]
        assert await rows(running) == [
            ("m", "m@1", "ready"), ("m", "m@2", "failed"), ("new", "new@1", "failed")
        ]  # fmt: skip
        assert (await running.get("/readyz"))[0] == 200
        assert (await running.post(UNLOAD, name="new"))[0] == 200  # clears what is remembered
        assert [row[0] for row in await rows(running)] == ["m", "m"]
        assert says(await running.post(LOAD, model="nowhere")) == (404, "model_not_found")


async def test_reload_resolves_the_reference_again(start_fleet, script) -> None:
    scripts = {"m": script("m@1")}
    async with start_fleet(scripts, "m") as running:
        await running.post("/v1/load_lora_adapter", lora_name="polite", lora_path="there")
        scripts["m"] = script("m@2")
        status, body, _ = await running.post(RELOAD, name="m")
        assert (status, body["version"], body["adapters"]) == (200, "m@2", ["polite"])
        assert (await running.post(model="polite", prompt="hi"))[0] == 200
        assert says(await running.post(model="m@1", prompt="hi")) == (404, "model_not_found")
        assert says(await running.post(RELOAD, name="other")) == (404, "model_not_found")
        assert (await running.post(LOAD, model="m"))[1]["adapters"] == []  # this says what it wants


async def test_reload_means_what_is_served_not_what_failed_to_replace_it(start_fleet, script) -> None:
    broken = script("m@2", ("--fail-with", "no weights"))
    async with start_fleet({"m:a": script("m@1"), "m:b": broken}, "m:a") as running:
        pid = running.gateway.route("m").pid
        assert says(await running.post(LOAD, model="m:b")) == (400, "load_failed")
        assert await rows(running) == [("m", "m@1", "ready"), ("m", "m@2", "failed")]
        status, body, _ = await running.post(RELOAD, name="m")
        assert (status, body.get("version")) == (200, "m@1"), body
        assert running.gateway.route("m").pid != pid
        assert ("m", "m@2", "failed") not in await rows(running)


async def test_reload_tries_a_model_again_that_has_never_been_ready(start_fleet, script) -> None:
    scripts = {"m": script("m@1", ("--fail-with", "no weights"))}
    async with start_fleet(scripts) as running:
        assert says(await running.post(LOAD, model="m")) == (400, "load_failed")
        scripts["m"] = script("m@2")
        status, body, _ = await running.post(RELOAD, name="m")
        assert (status, body.get("version")) == (200, "m@2"), body


async def test_reload_takes_the_adapters_that_are_held_not_those_of_the_start(start_fleet, script) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    async with start_fleet({"m": script("m@1"), "n": script("n@1")}) as running:
        adapters = {"kept": "a", "gone": "b", "moved": "old"}
        assert (await running.post(LOAD, model="m", adapters=adapters))[0] == 200
        for name in ("gone", "moved"):
            assert (await running.post(unload, lora_name=name))[0] == 200
        assert (await running.post(load, lora_name="moved", lora_path="new"))[0] == 200
        assert (await running.post(LOAD, model="n", adapters={"gone": "c"}))[0] == 200  # the name is free
        for _ in range(2):  # the second has the first as what it replaces
            assert (await running.post(RELOAD, name="m"))[0] == 200
            assert running.gateway.route("m").adapters == {"kept": "a", "moved": "new"}
        assert running.gateway.route("gone").spec.name == "n"
        assert says(await running.post(LOAD, model="m", adapters=adapters)) == (409, "name_taken")
        adapters["gone again"] = adapters.pop("gone")
        assert (await running.post(LOAD, model="m", adapters=adapters))[0] == 200
        assert running.gateway.route("m").adapters == adapters  # a load says what it wants


async def test_unloading_lets_open_requests_finish(start_fleet, script) -> None:
    async with start_fleet({"m": script("m@1"), "n": script("n@1")}, "m", "n") as running:
        worker = running.gateway.route("m")
        reading = asyncio.create_task(running.read(model="m", prompt="stream"))
        await running.until(lambda: worker.num_open == 1)
        unloading = asyncio.create_task(running.post(UNLOAD, name="m"))
        await running.until(lambda: "m" not in {w.spec.name for w in running.gateway.workers})
        assert says(await running.post(model="m", prompt="hi")) == (404, "model_not_found")
        assert (await running.post(model="n", prompt="hi"))[0] == 200
        assert "[DONE]" in await reading
        assert (await unloading)[0] == 200


async def test_what_does_not_end_in_time_is_cut(start_fleet, script) -> None:
    async with start_fleet({"m": script("m@1")}, "m", limits=Limits(drain_timeout=0.3)) as running:
        worker = running.gateway.route("m")
        plain = asyncio.create_task(running.post(model="m", prompt="sleep"))
        stream = asyncio.create_task(running.read(model="m", prompt="stream-sleep"))
        await running.until(lambda: worker.num_open == 2)
        await asyncio.sleep(0.2)  # the stream has begun
        unloading = asyncio.create_task(running.post(UNLOAD, name="m"))
        await running.until(lambda: not running.gateway.workers)
        assert await rows(running) == [("m", "m@1", "unloading")]
        assert says(await running.post(UNLOAD, name="m")) == (409, "already_unloading")
        assert says(await plain) == (503, "model_unloaded")
        text = await stream
        assert "model_unloaded" in text
        assert "[DONE]" not in text
        assert (await unloading)[0] == 200
        assert worker_processes() == []


async def test_unloading_ends_a_load(start_fleet, script, tmp_path: Path) -> None:
    scripts = {"m": script("m@1", ("--wait-for", str(tmp_path / "never")))}
    async with start_fleet(scripts) as running:
        loading = asyncio.create_task(running.post(LOAD, model="m"))
        await running.until(lambda: len(worker_processes()) == 1)
        assert (await running.post(UNLOAD, name="m"))[0] == 200
        assert says(await loading) == (409, "unloaded")
        assert worker_processes() == []
        assert await rows(running) == []


async def test_a_client_that_leaves_does_not_stop_a_load(start_fleet, script, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    async with start_fleet({"m": script("m@1", ("--wait-for", str(gate)))}) as running:
        loading = asyncio.create_task(running.post(LOAD, model="m"))
        await running.until(lambda: running.gateway.fleet.is_loading("m"))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        gate.touch()
        await running.until(lambda: bool(running.gateway.workers))
        assert (await running.post(model="m", prompt="hi"))[0] == 200


async def test_a_worker_that_dies_while_it_drains_is_not_replaced(start_fleet, script) -> None:
    async with start_fleet({"m": script("m@1")}, "m") as running:
        worker = running.gateway.route("m")
        sleeping = asyncio.create_task(running.post(model="m", prompt="sleep"))
        await running.until(lambda: worker.num_open == 1)
        unloading = asyncio.create_task(running.post(UNLOAD, name="m"))
        await running.until(lambda: not running.gateway.workers)
        os.kill(worker.pid, signal.SIGKILL)
        assert says(await sleeping) == (503, "worker_failed")
        assert (await asyncio.wait_for(unloading, 8))[0] == 200  # long before drain_timeout
        assert worker.restarts == 0
        assert worker_processes() == []


async def test_a_worker_that_was_given_up_can_be_replaced(start_fleet, script, tmp_path: Path) -> None:
    count = tmp_path / "count"
    scripts = {"m": script("m@1", ("--count-file", str(count), "--fail-from", "1"))}
    async with start_fleet(scripts, "m") as running:
        await running.post(model="m", prompt="die")
        await running.until(lambda: running.gateway.route("m").state == "failed")
        scripts["m"] = script("m@2")
        assert (await running.post(RELOAD, name="m"))[0] == 200
        assert (await running.post(model="m", prompt="hi"))[0] == 200


async def test_a_server_that_ends_leaves_no_process(start_fleet, script, tmp_path: Path) -> None:
    """While one model loads, one answers a request and one drains."""
    never = ("--wait-for", str(tmp_path / "never"))
    scripts = {"a": script("a@1"), "b": script("b@1"), "c": script("c@1", never)}
    async with start_fleet(scripts, "a", "b") as running:
        first, second = running.gateway.workers
        open_requests = [asyncio.create_task(running.post(model=name, prompt="sleep")) for name in ("a", "b")]
        await running.until(lambda: first.num_open == second.num_open == 1)
        unloading = asyncio.create_task(running.post(UNLOAD, name="a"))
        loading = asyncio.create_task(running.post(LOAD, model="c"))
        await running.until(lambda: len(worker_processes()) == 3)
        running.gateway.draining = True
        running.gateway.fleet.give_up_loads()
        assert says(await loading) == (503, "shutting_down")
        running.gateway.abort_all()
        for answer in open_requests:
            assert says(await answer) == (503, "shutting_down")
        assert says(await running.post(LOAD, model="c")) == (503, "shutting_down")
        await unloading
    assert worker_processes() == []


async def test_limits_and_names_are_checked_before_a_process_starts(start_fleet, script) -> None:
    scripts = {"a": script("a@1"), "b": script("b@1"), "also-a": script("a@1")}

    def claim(resolved, claimed: int) -> int:
        if resolved.entry.max_model_len:
            raise HttpError(409, "takes too much", code="insufficient_memory")
        return 1

    async with start_fleet(scripts, "a", limits=Limits(max_models=2), claim=claim) as running:
        assert says(await running.post(LOAD, model="also-a")) == (409, "name_taken")
        assert says(await running.post(LOAD, model="b", max_model_len=8)) == (409, "insufficient_memory")
        assert says(await running.post(LOAD, model="b", name="a@1")) == (409, "name_taken")
        assert (await running.post(LOAD, model="b"))[0] == 200
        assert says(await running.post(LOAD, model="b", name="c")) == (409, "too_many_models")
        assert (await running.post(LOAD, model="b"))[0] == 200  # in its own place
        await running.until(lambda: len(worker_processes()) == 2)  # the old one goes by itself


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        (LOAD, {}, 400, "model"),
        (LOAD, {"model": "a", "dtyp": "float32"}, 400, "dtyp"),
        (LOAD, {"model": "a", "dtype": "int3"}, 400, "dtype"),
        (LOAD, {"model": 3}, 400, "model"),
        (LOAD, {"model": "a", "name": "x\ny"}, 400, "printable"),
        (LOAD, {"model": "a", "name": ""}, 400, "printable"),
        (LOAD, [1], 400, "object"),
        (UNLOAD, {}, 400, "name"),
        (UNLOAD, {"name": "x" * 500}, 404, "xxx"),
        (RELOAD, {"name": ""}, 404, "not loaded"),
    ],
)
async def test_bad_bodies_are_told_what_is_wrong(start_fleet, path, body, status, names) -> None:
    async with start_fleet({}) as running:
        async with running.session.post(running.url + path, json=body) as response:
            error = (await response.json())["error"]
        assert response.status == status, error
        assert names in error["message"]
        assert len(error["message"]) < 400
        if status == 400 and path == LOAD and isinstance(body, dict):
            assert error["param"] in ("model", "name", "dtype", *body)


async def test_a_model_that_is_not_used_sleeps_and_wakes(start_fleet, script) -> None:
    async with start_fleet({"m": script("m@1")}, "m", idle_seconds=0.3) as running:
        worker = running.gateway.route("m")
        await running.until(lambda: worker.state == "asleep")
        await running.until(lambda: worker_processes() == [])
        assert (await running.get("/readyz"))[0] == 200
        assert await rows(running) == [("m", "m@1", "asleep")]
        answers = await asyncio.gather(*(running.post(model="m", prompt="hi") for _ in range(5)))
        assert [answer[0] for answer in answers] == [200] * 5
        assert worker.restarts == 0
        assert len(worker_processes()) == 1
        await running.until(lambda: worker.state == "asleep")
        assert (await running.post(UNLOAD, name="m"))[0] == 200


async def test_only_the_operator_changes_the_server(start_fleet, script) -> None:
    """Who may: on this machine without keys anyone but a browser; else only the operator's own key."""
    admin, user = {"authorization": "Bearer the-admin-key"}, {"authorization": "Bearer a-user-key"}
    cases = [
        (Access(loopback=True), {}, 404),
        (Access(loopback=True), {"origin": "http://evil.example"}, 403),
        (Access(loopback=False), {}, 403),
        (Access(["a-user-key"], loopback=True), user, 403),
        (Access(["a-user-key"], loopback=True), {}, 401),
        (Access(["a-user-key"], admin_key="the-admin-key"), user, 403),
        (Access(["a-user-key"], admin_key="the-admin-key"), admin, 404),
        (Access(admin_key="the-admin-key", loopback=True), {}, 401),
        (Access(admin_key="the-admin-key"), user, 403),
        (Access(admin_key="the-admin-key"), admin, 404),
    ]
    posts = [
        (UNLOAD, {"name": "x"}), (RELOAD, {"name": "x"}), (LOAD, {"model": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y", "model": "x"}),
        ("/v1/unload_lora_adapter", {"lora_name": "x", "model": "x"}),
    ]  # fmt: skip
    for number, (access, headers, expected) in enumerate(cases):
        async with start_fleet({}, access=access) as running:
            for path, body in posts:
                async with running.session.post(running.url + path, json=body, headers=headers) as response:
                    assert response.status == expected, (number, path)


async def test_the_operators_key_also_asks_models(start_fleet, script) -> None:
    access = Access(["a-user-key"], admin_key="the-admin-key")
    async with start_fleet({"m": script("m@1")}, "m", access=access) as running:
        headers = {"authorization": "Bearer the-admin-key"}
        async with running.session.get(running.url + "/v1/models", headers=headers) as response:
            assert response.status == 200


async def test_an_adapter_that_is_being_loaded_is_not_lost_by_a_reload(
    start_fleet, script, tmp_path: Path
) -> None:
    gate = tmp_path / "go"
    async with start_fleet({"one": script("one@1")}, "one") as running:
        (old,) = running.gateway.workers
        adapter = asyncio.create_task(
            running.post("/v1/load_lora_adapter", lora_name="late", lora_path=f"wait:{gate}")
        )
        await running.until(old.adapters_lock.locked)
        reload = asyncio.create_task(running.post(RELOAD, name="one"))
        await asyncio.sleep(0.3)  # it waits by now
        second = asyncio.create_task(
            running.post("/v1/load_lora_adapter", lora_name="later", lora_path="somewhere")
        )
        await asyncio.sleep(0.1)
        assert not adapter.done()
        assert not reload.done()
        gate.touch()
        assert (await adapter)[0] == 200
        status, body, _ = await reload
        assert (status, body["adapters"]) == (200, ["late"])
        assert running.gateway.workers != [old]
        assert (await running.post(model="late", prompt="hi"))[0] == 200
        # Who came after the reload was told so, and can try again.
        assert says(await second) == (409, "already_loading")
        status, *_ = await running.post("/v1/load_lora_adapter", lora_name="later", lora_path="somewhere")
        assert status == 200


async def test_loading_an_adapter_wakes_a_model_and_keeps_it_awake(
    start_fleet, script, tmp_path: Path
) -> None:
    gate = tmp_path / "go"
    async with start_fleet({"one": script("one@1")}, "one", idle_seconds=0.2) as running:
        (worker,) = running.gateway.workers
        await running.until(lambda: worker.state == "asleep")
        adapter = asyncio.create_task(
            running.post("/v1/load_lora_adapter", lora_name="late", lora_path=f"wait:{gate}")
        )
        await running.until(lambda: worker.state == "ready")
        await asyncio.sleep(0.6)
        assert worker.state == "ready"
        assert not adapter.done()
        gate.touch()
        assert (await adapter)[0] == 200
        await running.until(lambda: worker.state == "asleep")
        assert (await running.post(model="late", prompt="hi"))[0] == 200  # it woke with its adapter
