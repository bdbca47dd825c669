"""`rankfold serve`: a base model and the adapters of a folder over HTTP, in the words of OpenAI's API."""

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rankfold.cli._common import DtypeOption, ModelOption, load_base, say, stderr
from rankfold.errors import RankfoldError, UnsupportedError

KEY = "RANKFOLD_API_KEY"


def register(app: typer.Typer) -> None:
    app.command(
        epilog="Example: rankfold serve --model HuggingFaceTB/SmolLM2-135M-Instruct --adapters runs/adapters "
        "--port 8000 --max-memory 4GB"
    )(serve)


def serve(
    model: ModelOption,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="Folder whose subfolders are adapters; their names are models.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What requests call the base model.  [default: its last part]")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"Token that requests have to bring; {KEY} says it more quietly."),
    ] = None,
    max_memory: Annotated[
        str, typer.Option("--max-memory", metavar="SIZE", help="Pool of keys, values and adapters in use.")
    ] = "1GB",
    host_memory: Annotated[
        str, typer.Option("--host-memory", metavar="SIZE", help="Adapters that are kept at hand beside it.")
    ] = "1GB",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests that run at once.")] = 64,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests that may wait; then 429.")] = 256,
    first_token: Annotated[
        float | None,
        typer.Option("--first-token", min=0.01, help="Seconds until a first token; who waits longer gets 429.  [none]"),
    ] = None,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Largest request.")] = "1MB",
    max_prompt: Annotated[
        int | None, typer.Option("--max-prompt", min=1, help="Longest prompt, in tokens.  [default: the model's own]")
    ] = None,
    finetune: Annotated[
        list[Path] | None,
        typer.Option(
            "--finetune",
            metavar="JOB.yaml",
            help="Recipe of an adapter to train in the time that requests leave; more than once: one after the other.",
        ),
    ] = None,
    jobs: Annotated[
        Path, typer.Option("--jobs", help="Folder where such jobs keep their state, to go on after a restart.")
    ] = Path("runs/jobs"),
    latency: Annotated[
        float, typer.Option("--latency", min=0.001, help="Seconds that a step may take, a job's share included.")
    ] = 0.25,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 2048,
    log: Annotated[
        Literal["text", "json", "none"],
        typer.Option("--log", help="A line for each request: for people, as JSON on standard output, or not at all."),
    ] = "text",
    dtype: DtypeOption = "float32",
) -> None:
    """Serve a model and its adapters over HTTP, in the words of OpenAI's API.

    Ctrl-C (or SIGTERM) answers what was accepted and stops; a second one stops at once.
    """
    from rankfold.serve.server import Server, bind, check_key

    key = api_key if api_key is not None else os.environ.get(KEY)
    check_key(host, key)
    given = {"max-memory": max_memory, "host-memory": host_memory, "max-body": max_body}
    sizes = [_size(option, text) for option, text in given.items()]
    if adapters is not None and not adapters.is_dir():
        raise RankfoldError(f"--adapters: {adapters} is no folder: give the one whose subfolders are adapters")

    from rankfold.serve.api import Settings, create_app
    from rankfold.serve.engine import Engine, Limits
    from rankfold.train.processes import processes

    with bind(host, port) as where:
        loaded = load_base(model, dtype, None)
        if getattr(loaded.model.config, "is_encoder_decoder", False):
            raise UnsupportedError(f"--model: {model} is an encoder-decoder; causal language models can be served")
        served = loaded.model.to(processes().device)
        limits = Limits(batch=max_batch, waiting=max_waiting, first_token=first_token, latency=latency)
        engine = Engine(served, adapters, max_memory=sizes[0], host_memory=sizes[1], limits=limits)
        called = name or Path(model).name.removesuffix(".gguf")
        settings = Settings(called, key, sizes[2], max_prompt, max_tokens)
        app = create_app(engine, loaded.processor, settings, _LOGS[log])
        _train(engine, finetune or [], loaded, model, adapters, jobs)
        server = Server(app, lambda: _tell(where.getsockname(), settings, engine))
        with engine.start():
            server.run([where])
            if server.signal is not None:
                raise typer.Exit(128 + server.signal)  # the engine does not wait for anybody, then


def _train(engine: Any, recipes: list[Path], loaded: Any, model: str, adapters: Path | None, folder: Path) -> None:
    """Give the engine its fine-tuning jobs."""
    if not recipes:
        return
    if adapters is None:
        raise RankfoldError("--finetune: say by --adapters where the finished adapters go")
    if folder.resolve().is_relative_to(adapters.resolve()):
        raise RankfoldError(f"--jobs: {folder} is within the folder of adapters; give another one")

    from rankfold.serve.finetune import Job
    from rankfold.train.recipe_file import read_recipe

    for path in recipes:
        recipe = read_recipe(path)
        engine.train(Job(recipe, loaded, model, adapters, folder / recipe.name, engine.runner.attention))


def _size(option: str, text: str) -> int:
    from rankfold.compare.plan import quantity

    size = quantity(text)
    if not isinstance(size, float) or size < 1:
        raise RankfoldError(f"--{option}: {text!r} is no size: say 4GB, 512MB or a number of bytes")
    return int(size)


def _tell(address: tuple[Any, ...], settings: Any, engine: Any) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    known = len(engine.library.names())
    key = f' -H "Authorization: Bearer ${KEY}"' if settings.api_key is not None else ""
    body = json.dumps({"model": settings.name, "prompt": "Once upon a time", "max_tokens": 32})
    say(
        [
            f"serving {settings.name} and {known} adapter{'s' * (known != 1)} at http://{host}:{address[1]}/v1",
            f"try: curl http://{host}:{address[1]}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        ]
    )


def _text_line(noted: dict[str, Any]) -> None:
    from urllib.parse import quote

    tokens = f", {noted['prompt_tokens']} + {noted['completion_tokens']} tokens" if "prompt_tokens" in noted else ""
    model = f" {noted['model']!a}" if "model" in noted else ""
    what = f"{noted['method']} {quote(noted['path'])}{model}: {noted['status']} in {noted['seconds']:.2f} s{tokens}"
    stderr.print(what, markup=False, highlight=False, soft_wrap=True)


def _json_line(noted: dict[str, Any]) -> None:
    print(json.dumps({"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **noted}), flush=True)


_LOGS: dict[str, Callable[[dict[str, Any]], None] | None] = {"text": _text_line, "json": _json_line, "none": None}
