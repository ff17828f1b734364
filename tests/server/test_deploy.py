"""The files in deploy/ load, and what they call exists: no container and no cluster is started."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from receptance.cli import build
from receptance.server.config import read_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ROUTES = {"/health", "/ready"}


def yaml_of(name):
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def shown(arguments, tmp_path):
    """`receptance serve` with these arguments: its configuration."""
    result = CliRunner().invoke(build(), ["serve", *arguments, "--show"])
    assert result.exit_code == 0, result.output
    (tmp_path / "shown.toml").write_text(result.stdout)
    return read_config(tmp_path / "shown.toml")


def entry_point():
    return json.loads(re.search(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)[1])


def test_the_container_starts_a_command_that_exists(tmp_path):
    program, verb, *arguments = entry_point()
    assert (program, verb) == ("receptance", "serve")
    config = shown(arguments, tmp_path)
    assert config.auth.keys == "/keys/keys"  # it listens to everybody: never without a key
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M):
        assert all((DEPLOY.parent / word).exists() for word in source.split())


def test_compose_mounts_what_the_container_reads(tmp_path):
    (compose,) = yaml_of("compose.yaml")
    service = compose["services"]["receptance"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    inside = {volume.split(":")[1] for volume in service["volumes"]}
    config = shown(entry_point()[2:], tmp_path)
    assert str(Path(config.auth.keys).parent) in inside
    assert str(Path(config.sessions.folder).parent) in inside


def test_the_unit_starts_a_command_that_exists(tmp_path, monkeypatch):
    unit = (DEPLOY / "receptance.service").read_text()
    program, verb, *arguments = shlex.split(re.search(r"^ExecStart=(.*)$", unit, re.M)[1])
    (tmp_path / "server.toml").write_text("")
    assert (Path(program).name, verb) == ("receptance", "serve")
    here = [str(tmp_path / "server.toml") if x == "/etc/receptance/server.toml" else x for x in arguments]
    assert shown(here, tmp_path).sessions.folder == "/var/lib/receptance/sessions"


def test_systemd_finds_no_fault_with_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (DEPLOY / "receptance.service").read_text().replace("/opt/receptance/bin/receptance", shutil.which("true"))
    (tmp_path / "receptance.service").write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "receptance.service"], capture_output=True, text=True
    )
    assert [line for line in done.stderr.splitlines() if "receptance.service" in line] == []


def test_kubernetes_asks_our_routes_and_sets_our_settings(tmp_path):
    kinds = {(x["kind"], x["metadata"]["name"]): x for x in yaml_of("kubernetes.yaml")}
    services = {name for kind, name in kinds if kind == "Service"}
    pod = kinds["Deployment", "receptance"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {container[f"{x}Probe"]["httpGet"]["path"] for x in ("startup", "readiness", "liveness")} == ROUTES
    config = shown([*entry_point()[2:], *container["args"]], tmp_path)
    assert re.match(r"redis://([a-z-]+):", config.sessions.redis)[1] in services
    assert pod["terminationGracePeriodSeconds"] > config.limits.drain_seconds
    for service in (x for (kind, _), x in kinds.items() if kind == "Service"):
        labels = [x["spec"]["template"]["metadata"]["labels"] for x in kinds.values() if "template" in x["spec"]]
        assert service["spec"]["selector"] in labels


def test_the_ray_service_names_our_application_and_settings():
    yaml = pytest.importorskip("yaml")
    from importlib import import_module

    (service,) = yaml_of("rayservice.yaml")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(import_module(module), name))
    config = read_config(None, [f"{key}={value}" for key, value in application["args"].items()])
    assert (config.ray.replicas, config.ray.most_replicas) == (2, 8)
