"""Adapters as the gateway knows them: loaded at the operator's word, routed to, restored by restarts."""

from __future__ import annotations

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def load(running, name: str = "polite", path: str = "somewhere", **more: str) -> tuple[int, dict]:
    status, body, _ = await running.post(LOAD, lora_name=name, lora_path=path, **more)
    return status, body


async def test_an_adapter_is_a_model_while_it_is_loaded(start_gateway) -> None:
    async with start_gateway() as running:
        assert (await running.post(model="polite", prompt="hi"))[0] == 404
        assert (await load(running))[0] == 200
        for name in ("polite", "scripted:polite", "scripted@1:polite"):
            assert (await running.post(model=name, prompt="hi"))[0] == 200, name
        _, body = await running.get("/v1/models")
        assert [(entry["id"], entry.get("parent")) for entry in body["data"]] == [
            ("scripted", None),
            ("polite", "scripted"),
        ]
        assert body["data"][1]["root"] == "somewhere"
        assert (await running.get("/v1/models/polite"))[1]["parent"] == "scripted"
        assert (await running.post(UNLOAD, lora_name="polite"))[0] == 200
        assert (await running.post(model="polite", prompt="hi"))[0] == 404


async def test_what_is_refused(start_gateway) -> None:
    async with start_gateway() as running:
        assert (await load(running, path="bad"))[1]["error"]["param"] == "lora_path"
        assert (await running.post(model="polite", prompt="hi"))[0] == 404
        assert (await load(running))[0] == 200
        for name in ("polite", "scripted", "scripted@1"):
            status, body = await load(running, name)
            assert (status, body["error"]["param"]) == (400, "lora_name"), name
        assert (await load(running, "x", model="nobody"))[0] == 404
        status, body, _ = await running.post(LOAD, lora_nam="x", lora_path="y")
        assert (status, body["error"]["param"]) == (400, "lora_nam")


async def test_an_unexpected_error_has_the_shape_of_the_others(start_gateway, monkeypatch) -> None:
    async with start_gateway() as running:
        monkeypatch.setattr(running.gateway, "route", lambda _model: 1 // 0)
        status, body = await load(running)
        assert status == 500
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert "ZeroDivisionError" not in body["error"]["message"]


async def test_an_adapter_finds_its_model_among_several(start_gateway, worker_spec) -> None:
    specs = [worker_spec("one"), worker_spec("two", adapters=("rude=there",))]
    async with start_gateway(*specs) as running:
        assert (await load(running))[0] == 400  # of which model?
        assert (await load(running, model="one"))[0] == 200
        one, two = running.gateway.workers
        assert (one.adapters, two.adapters) == ({"polite": "somewhere"}, {"rude": "there"})
        assert running.gateway.route("rude") is two
        assert running.gateway.route("one:polite") is one
        assert (await load(running, "rude", model="one"))[0] == 400
        assert (await running.post(model="one:rude", prompt="hi"))[0] == 404
        assert (await running.post(UNLOAD, lora_name="rude"))[0] == 200
        assert two.adapters == {}


async def test_a_restart_loads_them_again(start_gateway) -> None:
    async with start_gateway() as running:
        (worker,) = running.gateway.workers
        await load(running)
        first = worker.pid
        await running.post(prompt="die")
        await running.until(lambda: worker.state == "ready" and worker.pid != first)
        assert worker.adapters == {"polite": "somewhere"}
        assert (await running.post(model="polite", prompt="hi"))[0] == 200
