"""The server as replicas on a Ray cluster of this machine, where Ray Serve is installed."""

import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from receptance.cli.model_source import find_model
from receptance.cli.serve_load import load
from receptance.errors import ConfigError
from receptance.server.config import ServedConfig, read_config
from receptance.server.ray_serve import deployment

NAME = "rwkv7-stories"


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'receptance\[ray,serve\]'"):
        deployment(read_config(None), [])


def replicas():
    """Process ids of Ray's replicas of this server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ServeReplica:" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def ask(client, id, text, **fields):
    """A turn; what a replica that dies spoils is sent again, as a client would."""
    body = {"session_id": id, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    for _ in range(60):
        try:
            answer = client.post("/v1/chat/completions", json={**body, **fields})
            if answer.status_code == 200:
                return answer.json()["choices"][0]["message"]["content"]
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError("no replica answered")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of a processor each, with Ray Serve; its address."""
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_replica_killed_in_mid_chat_takes_no_conversation_with_it(cluster, redis_url):
    """Two nodes with a replica each; sessions go on in the other one, with the very words of an uninterrupted chat."""
    from ray import serve

    settings = [f"sessions.redis={redis_url}", "ray.replicas=2", "ray.most_replicas=2"]
    loader = partial(load, NAME, find_model(None), ServedConfig(threads=1, slots=16))
    serve.run(deployment(read_config(None, settings), [loader]), name="receptance", route_prefix="/")
    with httpx.Client(base_url=cluster, timeout=60) as client:
        assert len(replicas()) == 2
        ids = [client.post("/v1/sessions", json={}).json()["id"] for _ in range(5)]
        *killed, whole = ids
        said = {id: [ask(client, id, "The fox ran.")] for id in ids}
        for number, id in enumerate(killed):
            body = {"session_id": id, "messages": [{"role": "user", "content": " and"}], "stream": True}
            try:
                with client.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 5000}) as stream:
                    lines = stream.iter_lines()
                    next(lines)
                    for pid in replicas()[: 1 + number % 2]:  # one, then both
                        os.kill(pid, signal.SIGKILL)
                    for _ in lines:
                        pass
            except httpx.TransportError:
                pass
            turns = None
            while turns is None:
                try:
                    answer = client.get(f"/v1/sessions/{id}")
                    turns = answer.json()["turns"] if answer.status_code == 200 else None
                except httpx.TransportError:
                    time.sleep(0.5)
            assert turns[0]["assistant"] == said[id][0]
            for _ in turns[1:]:  # the other replica had it, and finished: undone for the comparison
                client.post(f"/v1/sessions/{id}/rewind", json={"turn": 1})
        for id in ids:
            said[id] += [ask(client, id, " Then it"), ask(client, id, " So")]
        assert all(said[id] == said[whole] for id in killed)
    serve.delete("receptance")


@pytest.mark.slow
def test_rays_own_configuration_starts_it_and_work_brings_a_second_replica(cluster, redis_url):
    """`ray_app`, as a RayService names it, with the settings of deploy/rayservice.yaml; idle it has one replica."""
    from ray import serve

    from receptance.cli.serve import ray_app

    settings = {"sessions.redis": redis_url, "ray.replicas": "1", "ray.most_replicas": "2", "ray.target_requests": "2"}
    serve.run(ray_app(settings), name="receptance", route_prefix="/")
    with httpx.Client(base_url=cluster, timeout=120) as client, ThreadPoolExecutor(12) as pool:
        assert client.get("/v1/models").json()["data"][0]["id"] == NAME
        assert len(replicas()) == 1
        id = client.post("/v1/sessions", json={}).json()["id"]
        first = ask(client, id, "The fox ran.")

        def write(seed):
            body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "seed": seed}
            return client.post("/v1/completions", json=body).status_code

        until, codes = time.monotonic() + 240, []
        while len(replicas()) < 2 and time.monotonic() < until:
            codes += pool.map(write, range(12))
        assert len(replicas()) == 2
        assert set(codes) == {200}
        assert [turn["assistant"] for turn in client.get(f"/v1/sessions/{id}").json()["turns"]] == [first]
    serve.delete("receptance")


def test_the_settings_of_replicas_are_rays():
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    settings = ["ray.replicas=2", "ray.most_replicas=8", "ray.target_requests=5", "ray.cpus=3", "ray.gpus=0.5"]
    made = deployment(read_config(None, ["sessions.redis=redis://x", *settings]), [])._bound_deployment
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 8, 5.0)
    assert made.ray_actor_options["num_cpus"] == 3
    assert made.ray_actor_options["num_gpus"] == 0.5


def test_replicas_that_would_share_a_folder_are_refused():
    pytest.importorskip("ray.serve", reason="needs ray[serve]")
    with pytest.raises(ConfigError, match=r"sessions\.redis"):
        deployment(read_config(None, ["ray.most_replicas=2"]), [])
