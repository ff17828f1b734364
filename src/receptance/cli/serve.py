"""`receptance serve`: models over HTTP."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from receptance.cli import options
from receptance.cli.errors import USER_ERROR
from receptance.cli.model_source import ModelSource, find_model
from receptance.cli.serve_load import load
from receptance.errors import ConfigError

if TYPE_CHECKING:
    from receptance.server.config import ServerConfig
    from receptance.server.served import ServedModel


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|SECTION.KEY=VALUE", help="Models, and settings in place of the file's.", show_default=False
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML configuration.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="Default: 8000.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others reach it without a key.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="N", help="Texts at once; default: 64, GPU 256.")
    ] = None,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Serve with replicas on a Ray cluster; see ray.replicas.")
    ] = False,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="Make an API key, write it to NAME.key, stop.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")] = False,
) -> None:
    """Serve models over HTTP: OpenAI's API, Ollama's, sessions that are kept as states, and a page to chat on.

    Several MODELs are served at once; the first is the default. Without one, the model inside the package is served.
    It listens on this machine alone unless told otherwise, and then needs a key (--new-key). docs/server.md lists all
    settings.

    \b
    Examples:
      receptance serve
      receptance serve model.pth --port 9000
      receptance serve small.gguf large.pth limits.texts=256 --device cuda
      receptance serve --new-key laptop
      receptance serve --config server.toml --host 0.0.0.0
      receptance serve --ray ray.replicas=2 sessions.redis=redis://host:6379/0
    """
    from receptance.server.config import DEFAULT_CONFIG_FOLDER, ServedConfig, check, read_config

    words = words or []
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    names = [word for word in words if word not in overrides]
    listen: dict[str, object] = {"host": host, "port": port, "insecure": insecure or None}
    overrides += [f"listen.{name}={_toml(value)}" for name, value in listen.items() if value is not None]
    keys_file = DEFAULT_CONFIG_FOLDER / "keys"
    if new_key is not None:
        from receptance.server.keys import new_key as make

        chosen = read_config(config, [*overrides, "listen.insecure=true"])
        keys_file = Path(chosen.auth.keys) if chosen.auth.keys else keys_file
        secret = Path(f"{Path(new_key).name}.key")
        make(keys_file, new_key, secret)
        typer.echo(f"the key is in {secret}, readable by you alone; its hash is in {keys_file}")
        return
    if keys_file.exists() and not insecure:
        overrides.insert(0, f"auth.keys={_toml(str(keys_file))}")
    chosen = read_config(config, overrides)
    models = dict(chosen.models)
    for name in names or ([] if models else [None]):  # type: ignore[list-item]
        source = find_model(name)
        models[_free(models, _word(source))] = ServedConfig(model=name or "")
    for flag, value in (
        ("dtype", dtype),
        ("device", device),
        ("engine", engine),
        ("threads", threads),
        ("slots", slots),
    ):
        if value is not None:
            models = {name: replace(model, **cast("Any", {flag: value})) for name, model in models.items()}
    chosen = replace(chosen, models=models)
    check(chosen)
    run(chosen, show, on_ray)


def run(config: "ServerConfig", show: bool, on_ray: bool) -> None:
    from receptance.server.config import as_toml

    if show:
        typer.echo(as_toml(config), nl=False)
        return
    try:
        from receptance.server.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("receptance"):
            raise
        raise ConfigError(f"the server needs {error.name}: pip install 'receptance[serve]'") from None
    loaders = loaders_of(config)
    if on_ray:
        from receptance.server.ray_serve import serve_on_ray

        serve_on_ray(config, loaders)
    elif serve(config, loaders):
        raise typer.Exit(USER_ERROR)


def loaders_of(config: "ServerConfig") -> "list[Callable[[], ServedModel]]":
    """What loads each model. Raises ConfigError for one that is not there."""
    sources = {name: find_model(model.model or None) for name, model in config.models.items()}
    return [partial(load, name, sources[name], model) for name, model in config.models.items()]


def ray_app(arguments: dict[str, str]) -> Any:
    """For Ray's own configuration files: import_path "receptance.cli.serve:ray_app", args {config: FILE}, or settings
    such as {"sessions.redis": "redis://store:6379/0"}, or both."""
    from receptance.server.config import ServedConfig, read_config
    from receptance.server.ray_serve import deployment

    settings = {"listen.insecure": "true", **arguments}  # Ray's proxy listens, not we
    config = read_config(settings.pop("config", None), [f"{name}={value}" for name, value in settings.items()])
    models = config.models or {_word(find_model(None)): ServedConfig()}
    return deployment(replace(config, models=models), loaders_of(replace(config, models=models)))


def _word(source: ModelSource) -> str:
    """A name that fits into a URL, from the file's or the folder's."""
    path = source.path
    name = path.name if path.is_dir() or source.kind == "embedded" else path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:128] or "model"


def _free(taken: dict[str, Any], name: str) -> str:
    return next(word for i in range(1, 1000) if (word := name if i == 1 else f"{name[:120]}-{i}") not in taken)


def _toml(value: object) -> str:
    import json

    return json.dumps(value)
