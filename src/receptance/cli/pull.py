"""`receptance pull`: download a model."""

from typing import Annotated

import typer

from receptance.cli import download


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="org/name or org/name:file of the hub.")],
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit.")] = "main",
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="A mirror; default: HF_ENDPOINT or huggingface.co.")
    ] = None,
) -> None:
    """Download a model of the Hugging Face hub into its cache and print where it lies.

    Run it again to go on after an interruption. SHA-256 is verified where the hub states it. HF_HOME (cache), HF_TOKEN
    and HF_HUB_OFFLINE are honoured. Then use the model as org/name or org/name:file.

    \b
    Examples:
      receptance pull BlinkDL/rwkv7-g1:rwkv7-g1-0.1b-20250307-ctx4096.pth
      receptance pull fla-hub/rwkv7-0.1B-g1
    """
    typer.echo(download.pull(name, revision=revision, endpoint=endpoint))
