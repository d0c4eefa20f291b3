"""`adapter convert`: a folder of another dialect, written in ours, or as a server takes it."""

from __future__ import annotations

from pathlib import Path

import click

from ..adapter import load
from ..serving import RANKS, for_vllm
from .output import print_json, size


@click.command()
@click.argument("ref")
@click.option("-o", "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--to", type=click.Choice(["peft", "vllm"]), default="peft", show_default=True, help="For whom.")
@click.option(
    "--max-lora-rank",
    "max_rank",
    type=click.Choice([str(rank) for rank in RANKS]),
    help="vLLM's own option, if it is set already. By default the smallest that holds the adapter is said.",
)
@click.option("--force", is_flag=True, help="Replace the adapter at OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def convert(ref: str, out: Path, to: str, max_rank: str | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Write the adapter in folder REF in PEFT's layout.

    REF may be a folder of any format that a plugin reads: of AdapterHub's library `adapters` too. With --to vllm it is
    one LoRA of one rank and one alpha, without rsLoRA and patterns, which PEFT reads too; what vLLM does not serve is
    refused.

    \b
    adapter convert sst2-adapterhub -o sst2
    adapter convert sql -o served --to vllm
    """
    if max_rank is not None and to != "vllm":
        raise click.UsageError("--max-lora-rank is for --to vllm")
    needs: dict[str, int] = {}
    if to == "vllm":
        from ..save import save

        source, enough = for_vllm(load(ref).source, None if max_rank is None else int(max_rank))
        planned, _ = save(source, out, force=force)
        needs = {"rank": source.rank, "max_lora_rank": enough}
    else:
        planned, _ = load(ref).write(out, force=force)
    method, sites = planned.contents.method.name, planned.contents.sites
    if as_json:
        print_json({"out": str(out), "method": method, "modules": sorted(sites), "bytes": planned.nbytes, **needs})
    elif not quiet:
        click.echo(f"wrote {out}: {method}, {len(sites)} modules, {planned.dtype}, {size(planned.nbytes)}")
        if needs:
            click.echo(f"serve it with: vllm serve … --enable-lora --max-lora-rank {needs['max_lora_rank']}")
