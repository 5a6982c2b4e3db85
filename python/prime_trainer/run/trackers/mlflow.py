"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from .base import TrackedRun, flat, tagged

_MOST = 100
"""Parameters that MLflow takes in one call."""
_LONGEST = 500
"""Characters of a parameter that every version of MLflow takes."""


class MlflowTracker:
    """One MLflow run, at MLFLOW_TRACKING_URI, or with `metrics.local` in the run's folder `mlruns`."""

    def __init__(self, run: TrackedRun) -> None:
        if run.tracking.local:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        uri = (run.folder / "mlruns").resolve().as_uri() if run.tracking.local else None
        self._client = MlflowClient(tracking_uri=uri)
        self._id = run.identity("mlflow", lambda: self._create(run))
        if not self._client.get_run(self._id).data.params:
            params = [Param(key, str(value)[:_LONGEST]) for key, value in flat(run.config)]
            for at in range(0, len(params), _MOST):
                self._client.log_batch(self._id, params=params[at : at + _MOST])
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        found = self._client.get_experiment_by_name(run.tracking.project)
        experiment = self._client.create_experiment(run.tracking.project) if found is None else found.experiment_id
        return str(self._client.create_run(experiment, run_name=run.name).info.run_id)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        metrics = [self._metric(key, value, now, step) for key, value in tagged(stage, values).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)
