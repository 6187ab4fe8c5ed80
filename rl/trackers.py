"""Where the metrics of a run are shown besides its folder: TensorBoard, Weights & Biases, Prometheus.

A tracker is a view of `metrics.jsonl`: one that fails is said once and left out, and the run goes on.
"""

import importlib.util
import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rl.monitor_config import MonitorConfig, WandbConfig

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

# Seconds that Weights & Biases may hold the run up: at its start, and at its end.
PATIENCE_SECONDS = 30.0


class Tracker(Protocol):
    """One place where metrics are shown.

    label: its name in messages. failures: what its methods raise when it cannot be written or reached.
    """

    label: str
    failures: tuple[type[Exception], ...]

    def open(self, first_step: int | None) -> None:
        """Comes before the first `write`. first_step: where a resumed run goes on; what was logged of it and after it
        no longer counts."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """values: the finite metrics of the step, by name."""

    def close(self) -> None:
        """Brings everything written to where it belongs."""


class Guarded:
    """A tracker that is opened when it is first written, and given up, with one warning, when it fails."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._opened = self._failed = False

    def write(self, step: int, values: Mapping[str, float], first_step: int | None) -> None:
        if self._failed:
            return
        try:
            if not self._opened:
                self._tracker.open(first_step)
                self._opened = True
            self._tracker.write(step, values)
        except self._tracker.failures as error:
            self._give_up(error)

    def close(self) -> None:
        if self._failed or not self._opened:
            return
        try:
            self._tracker.close()
        except self._tracker.failures as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        logger.warning("%s cannot be written (%s); the run goes on without it", self._tracker.label, error)


class TensorBoard:
    """Event files in the run folder."""

    label = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir

    def open(self, first_step: int | None) -> None:
        # Imported here because it imports torch, which commands that only read a run folder should not wait for.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(str(self._log_dir), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of a project. A resumed run goes on in the same one, in which steps done again appear again.

    run_dir: where the run's identity is kept, and offline data. recipe: shown as the run's config.
    """

    label = "Weights & Biases"

    def __init__(self, config: WandbConfig, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, self._config, self._run_dir, self._recipe = wandb, config, run_dir, recipe
        self.failures: tuple[type[Exception], ...] = (OSError, wandb.Error)

    def open(self, first_step: int | None) -> None:
        settings = self._wandb.Settings(
            init_timeout=PATIENCE_SECONDS,
            login_timeout=PATIENCE_SECONDS,
            finish_timeout=PATIENCE_SECONDS,
            console="off",
            quiet=True,
        )
        self._run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            mode=self._config.mode,
            name=self._run_dir.resolve().name,
            id=self._identity(),
            resume="allow",
            dir=str(self._run_dir),
            config=dict(self._recipe),
            settings=settings,
        )
        # Its own step counter cannot go back, as a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def _identity(self) -> str:
        path = self._run_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        return path.read_text()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """Gauges among Ray's own metrics, which Prometheus reads from every node: `ray_lockstep_reward_mean{run="..."}`."""

    label = "Prometheus"

    def __init__(self, run: str) -> None:
        from ray.exceptions import RaySystemError

        self._run = run
        self._gauges: dict[str, Any] = {}
        self.failures: tuple[type[Exception], ...] = (OSError, RaySystemError)

    def open(self, first_step: int | None) -> None:
        import ray

        ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
        if max(ports, default=-1) <= 0:
            raise OSError("no node of the Ray cluster exports metrics; it was started without ray[default]")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in {"step": float(step), **values}.items():
            self._gauge(name).set(value)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            gauge = Gauge(gauge_name(name), name, ("run",))
            self._gauges[name] = gauge.set_default_tags({"run": self._run})
        return self._gauges[name]

    def close(self) -> None:
        """Ray takes the gauges away with the driver."""


def gauge_name(metric: str) -> str:
    """`lockstep_eval_avg_8` of `eval/avg@8`: Prometheus allows letters, digits and underscores."""
    return "lockstep_" + re.sub("[^a-zA-Z0-9]+", "_", metric).strip("_")


def trackers(config: MonitorConfig, run_dir: Path, recipe: Mapping[str, Any]) -> list[Tracker]:
    """TensorBoard, and those that the recipe asks for."""
    found: list[Tracker] = [TensorBoard(run_dir / "tensorboard")]
    if config.wandb:
        found.append(WeightsAndBiases(config.wandb, run_dir, recipe))
    if config.prometheus:
        found.append(Prometheus(run_dir.resolve().name))
    return found


def check_trackers(config: MonitorConfig) -> None:
    """Raises ValueError when a tracker that the recipe asks for is not installed."""
    wanted = (
        ("monitor.wandb", config.wandb is not None, "wandb", "wandb", "monitor.wandb=null"),
        ("monitor.prometheus", config.prometheus, "prometheus_client", "prometheus", "monitor.prometheus=false"),
    )
    for key, asked, package, extra, off in wanted:
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{key} needs the package {package}, which is not installed: "
                f"pip install 'lockstep-rl[{extra}]', or set {off}"
            )
