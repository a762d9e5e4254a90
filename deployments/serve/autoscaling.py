"""Ray Serve autoscaling policy for all formats; runs in Serve's controller.

`serve_config.yaml` names it.  Serve pickles this module by value and calls the policy in every
control loop, so it imports little, never blocks and never raises.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from scheduler.scaling import FormatDemand, ScalingDirective, desired_processes

logger = logging.getLogger(__name__)

_DIRECTIVE_KEY = b"impetus:scaling"
_READ_INTERVAL_S = 1.0


def write_directive(directive: ScalingDirective) -> None:
    """Store the directive for the policy; blocks for one call to Ray's GCS.

    Ray's internal key-value store is reachable from the scheduler and from Serve's controller on
    any machine, without a call between the two.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_DIRECTIVE_KEY, directive.to_json().encode(), overwrite=True)


def read_directive() -> ScalingDirective:
    """Return the last stored directive; the default before the first."""
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(_DIRECTIVE_KEY)
    return ScalingDirective.from_json(text.decode()) if text else ScalingDirective()


class FormatPolicy:
    """Decides the number of replicas of each format's deployment; see `scheduler.scaling`.

    Source: Ray Serve 2.60, `_apply_app_level_autoscaling_config`: each
    deployment's bounds and delays apply to the result, and a deployment left out is unchanged.
    """

    def __init__(
        self,
        read: Callable[[], ScalingDirective] = read_directive,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock = clock
        self._directive = ScalingDirective()
        self._read_at = float("-inf")
        self._last_problem = ""

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
        """Return the numbers of replicas by deployment id, and no state."""
        try:
            demand = {key.name: _demand(context) for key, context in contexts.items()}
            numbers = desired_processes(demand, self._fresh())
        except Exception as problem:
            # Serve would log this four times a second.
            if repr(problem) != self._last_problem:
                self._last_problem = repr(problem)
                logger.exception("autoscaling failed; the numbers of replicas stay unchanged")
            return {}, {}
        return {key: numbers[key.name] for key in contexts if key.name in numbers}, {}

    def _fresh(self) -> ScalingDirective:
        now = self._clock()
        if now - self._read_at >= _READ_INTERVAL_S:
            self._read_at = now
            self._directive = self._read()
        return self._directive


def _demand(context: Any) -> FormatDemand:
    return FormatDemand(
        requests=context.total_num_requests,
        processes=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        served=context.config.get_target_ongoing_requests(),
    )
