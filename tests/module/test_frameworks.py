"""The engine inside other programs: a Starlette or FastAPI app, a plain script, a notebook."""

from __future__ import annotations

import ast
import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

from durable.module import Application, DurableModule, DynamicModule
from tests.house.sources import ROOT
from tests.module.shop import FakeGateway, Gateway, Payments, ShopModule, greet


class AppModule:
    """The root; each test says what is in it."""


def shop() -> Application:
    root = DynamicModule(AppModule, [DurableModule.for_root("memory://"), ShopModule])
    return Application(root).override(Gateway, FakeGateway())


def test_starlette(require: Any) -> None:
    """The engine lives in a Starlette app's lifespan; requests find it, and its providers, in their state."""
    require("starlette")
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    async def hello(request: Request) -> JSONResponse:
        app: Application = request.state.durable_app
        run = await app.start(greet, request.path_params["name"])
        return JSONResponse({"said": await run.result(), "payments": type(app.get(Payments)).__name__})

    app = shop()
    with TestClient(Starlette(routes=[Route("/hello/{name}", hello)], lifespan=app.lifespan)) as client:
        assert client.get("/hello/you").json() == {"said": "hello you", "payments": "Payments"}
    assert app._state == "closed"


def test_fastapi(require: Any) -> None:
    """In FastAPI a dependency hands a provider to an endpoint; the providers are the modules' own."""
    require("fastapi")
    from fastapi import Depends, FastAPI
    from starlette.testclient import TestClient

    app = shop()
    api = FastAPI(lifespan=app.lifespan)

    def payments() -> Payments:
        return app.get(Payments)

    depends = Depends(payments)

    @api.post("/hello/{name}")
    async def hello(name: str, payments: Any = depends) -> dict[str, Any]:
        return {"said": await app.start_and_wait(greet, name), "shared": payments is app.get(Payments)}

    with TestClient(api) as client:
        assert client.post("/hello/you").json() == {"said": "hello you", "shared": True}


def test_in_a_lifespan_of_ones_own(require: Any) -> None:
    """An app with a lifespan already enters the Application in it."""
    require("starlette")
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    app = shop()

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with app:
            yield

    with TestClient(Starlette(lifespan=lifespan)):
        assert app.durable.engine.incarnation


def test_a_plain_script(tmp_path: Path) -> None:
    """A script without modules, and one with, need nothing but asyncio.run."""
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from durable import Context, workflow\n"
        "from durable.module import Application, DurableModule, module\n"
        "@workflow\n"
        "async def greet(ctx: Context, name: str) -> str:\n"
        "    return 'hello ' + name\n"
        "@module(imports=[DurableModule.for_root('memory://')], providers=[greet])\n"
        "class AppModule: ...\n"
        "async def main() -> None:\n"
        "    async with Application(AppModule) as app:\n"
        "        print(await app.start_and_wait(greet, 'script'))\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "hello script\n"


def test_a_notebook() -> None:
    """Cells with top-level await, on a loop that goes on between them, may define workflows, open an app and close it."""
    cells = [
        "from durable import Context, workflow\nfrom durable.module import create, module, DurableModule",
        "@workflow\nasync def cell(ctx: Context, n: int) -> int:\n    return n + 1",
        "@module(imports=[DurableModule.for_root('memory://')], providers=[cell])\nclass Notebook: ...",
        "app = await create(Notebook)",
        "run = await app.start(cell, 41)",
        "answer = await run.result()",
        "await app.close()",
    ]
    names: dict[str, Any] = {"__name__": "__main__"}
    loop = asyncio.new_event_loop()
    try:
        for cell in cells:
            code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & inspect.CO_COROUTINE:
                loop.run_until_complete(eval(code, names))
            else:
                exec(code, names)
        assert names["answer"] == 42
    finally:
        loop.close()


async def test_two_apps_in_one_process() -> None:
    """Two applications of the same modules share nothing."""
    async with shop() as one, shop() as two:
        assert one.get(Payments) is not two.get(Payments)
        assert one.durable.registry is not two.durable.registry
        assert await one.start_and_wait(greet, "one") == "hello one"


def test_the_engine_knows_no_modules() -> None:
    """`import durable`, the engine and a plain Durable load nothing of the module system."""
    program = "import sys, durable, durable.app, durable.engine.engine; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"durable.module", "dependency_injector"} & set(done.stdout.split())
