"""`rankfold inspect`: what a saved adapter is, from its files alone."""

from collections import Counter
from typing import Annotated, Any

import typer

from rankfold.cli._common import JsonOption, print_json, stdout

_ALARMS = 4  # shown; the worst come first


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: rankfold inspect runs/gsm8k/adapter")(inspect)


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter, or its hub id.")],
    json: JsonOption = False,
) -> None:
    """Show what a saved adapter is: method, targets, size, base model. Loads no model and no weights."""
    from rankfold.audit.record import read as read_audit
    from rankfold.core.checkpoint import read

    file = read(adapter)
    audited = read_audit(file.path)
    if json:
        tensors = {
            name: {"dtype": str(entry.dtype).removeprefix("torch."), "shape": list(entry.shape)}
            for name, entry in file.tensors.items()
        }
        coded = None if file.encoding is None else file.encoding.by
        facts = {**file.document.model_dump(by_alias=True), "bytes": file.bytes, "compressed": coded}
        audit = None if audited is None else audited.model_dump(exclude={"id"})
        print_json({**facts, "audit": audit, "tensors": tensors})
        return

    from rich.markup import escape
    from rich.table import Table

    document = file.document
    # Blocks of one model repeat: layers.0.q_proj, layers.1.q_proj, ... are one line.
    sites = document.sites.items()
    kinds = Counter((_last(name), site.kind, "×".join(map(str, site.shape))) for name, site in sites)
    init = "the method's own"
    if document.init is not None:
        init = _component(document.init) + (", folded" if document.fold else "")
    facts = {
        "name": document.name,
        "method": _component(document.method),
        "init": init,
        "base": str(document.base),
        "parameters": f"{file.num_parameters():,} in {len(file.tensors)} tensors, {file.bytes / 2**20:.2f} MiB",
        "in full": ", ".join(document.modules) or "none",
        "seed": str(document.seed),
        "written by": f"rankfold {document.rankfold}, format {document.format}",
    }
    if document.forced is not None:
        facts["forced"] = document.forced
    if document.ported:
        facts["ported from"] = ", ".join(map(str, document.ported))
    if file.encoding is not None:
        facts["compressed"] = _component(file.encoding.by)
    facts["audit"] = "none" if audited is None else ", ".join(map(str, audited.alarms[:_ALARMS])) or "no alarm"
    if audited is not None:
        if len(audited.alarms) > _ALARMS:
            facts["audit"] += f", and {len(audited.alarms) - _ALARMS} more alarms"
        if audited.missing:
            facts["audit"] += f"; not measured: {', '.join(audited.missing)}"
    width = max(map(len, facts))
    for key, value in facts.items():
        stdout.print(f"[bold]{key:<{width}}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)
    table = Table("layer", "kind", "shape", "count")
    for (name, kind, shape), count in kinds.items():
        table.add_row(name, kind, shape, str(count))
    stdout.print(table)


def _last(site: str) -> str:
    return site.rpartition(".")[2]


def _component(described: dict[str, Any]) -> str:
    hyper = ", ".join(f"{key}={value}" for key, value in described.items() if key != "name")
    return f"{described['name']}({hyper})"
