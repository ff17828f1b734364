"""The server as a Ray Serve deployment: replicas on many machines that share one store. Needs the extra `ray`.

A session belongs to no replica: each turn's state is read from the store by whichever replica is asked, so that one
that dies takes no conversation with it. Ray belongs on a network of trusted machines: whoever reaches it can run code.
"""

from collections.abc import Callable, Sequence
from typing import Any

from receptance.errors import ConfigError
from receptance.server.config import ServerConfig
from receptance.server.served import ServedModel

Loader = Callable[[], ServedModel]


def deployment(config: ServerConfig, loaders: Sequence[Loader]) -> Any:
    """What `ray.serve.run` takes. Each replica loads the models itself, before any request is sent to it.

    Raises ConfigError where Ray Serve is not installed, or where several replicas would share a folder.
    """
    try:
        from ray import serve
    except ImportError:
        raise ConfigError("serving with Ray needs it installed: pip install 'receptance[ray,serve]'") from None
    wanted = config.ray
    most = max(wanted.replicas, wanted.most_replicas)
    if most > 1 and config.sessions.redis is None:
        raise ConfigError(f"up to {most} replicas share their sessions in Redis: set sessions.redis to its URL")

    def build() -> Any:
        from receptance.server.app import Application

        return Application(config, [load() for load in loaders])

    scaling: dict[str, Any] = {"num_replicas": wanted.replicas}
    if most > wanted.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": wanted.replicas,
                "max_replicas": most,
                "target_ongoing_requests": wanted.target_requests,
            }
        }
    made = serve.deployment(
        serve.ingress(build)(),
        name="receptance",
        ray_actor_options={"num_cpus": wanted.cpus, "num_gpus": wanted.gpus},
        # our own limits answer 429 and 503, with Retry-After; Ray's queue must not hold requests before them
        max_ongoing_requests=config.limits.requests + 64,
        graceful_shutdown_timeout_s=config.limits.drain_seconds,
        health_check_period_s=2,
        **scaling,
    )
    return made.bind()


def serve_on_ray(config: ServerConfig, loaders: Sequence[Loader]) -> None:
    """Serve on the cluster that `ray.init` finds, or starts here, until told to end. Raises ConfigError."""
    application = deployment(config, loaders)
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    serve.start(http_options={"host": config.listen.host, "port": config.listen.port})
    try:
        serve.run(application, name="receptance", route_prefix="/", blocking=True)
    finally:
        serve.shutdown()
