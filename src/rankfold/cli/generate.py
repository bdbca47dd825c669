"""`rankfold generate`: what a model says to a prompt, with an adapter or without."""

from pathlib import Path
from typing import Annotated

import typer

from rankfold.cli._common import DtypeOption, JsonOption, ModelOption, load_adapter, load_base, print_json, stderr


def register(app: typer.Typer) -> None:
    app.command(epilog='Example: rankfold generate --model BASE --adapter runs/gsm8k/adapter --chat --prompt "2 + 2?"')(
        generate
    )


def generate(
    model: ModelOption,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to go on from. Repeatable.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Folder of a saved adapter.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    dtype: DtypeOption = "float32",
    json: JsonOption = False,
) -> None:
    """Generate text from prompts."""
    import torch

    from rankfold.train import encode, samples
    from rankfold.train.processes import processes

    loaded = load_base(model, dtype, None)
    if adapter is not None:
        load_adapter(loaded, adapter)
    texts = prompt
    if chat:
        turns = [[{"role": "user", "content": text}] for text in prompt]
        texts = [encode.chat_text(loaded.processor, turn, add_generation_prompt=True) for turn in turns]
    options = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    loaded.model.to(processes().device).eval()
    answers = []
    with stderr.status("generating"):
        for text in texts:
            answers += samples.generate(
                loaded.model, loaded.processor, [text], special=not chat, max_new_tokens=max_new_tokens, **options
            )
    if json:
        print_json([{"prompt": p, "answer": a} for p, a in zip(prompt, answers, strict=True)])
        return
    for answer in answers:
        print(answer)
