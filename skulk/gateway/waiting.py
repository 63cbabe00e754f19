"""Why a placed model can't answer now, in one honest sentence, and how far its load is."""

from __future__ import annotations

from typing import Literal

import msgspec

from skulk.cluster.view import ClusterView, phase_of, runner_of
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.wire.beats import RunnerStatus
from skulk.wire.state import Instance

RETRY_LOADING_S = 5.0
RETRY_PENDING_S = 15.0


_COMING = ("waiting", "fetching", "verifying")
LoadPhase = Literal["placing", "downloading", "loading", "warming"]


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """How far the load of a model is; ``done`` of ``total`` bytes of its weights, in its phase."""

    model: str
    phase: LoadPhase
    done: int
    total: int


class LoadingError(UnavailableError):
    """``instance_not_ready``, with how far the load is; the envelope shows it beside the error."""

    def __init__(self, detail: str, loading: Loading) -> None:
        super().__init__("instance_not_ready", detail, retry_after_s=RETRY_LOADING_S)
        self.loading = loading


def not_placed(model_id: str) -> RequestError:
    """The refusal of a known model that has no instance."""
    return RequestError(
        "model_not_placed",
        f"the model {model_id} is not placed; place it with POST /place_instance "
        f'{{"model_id": "{model_id}"}} (or: skulk place {model_id})',
        param="model",
    )


def why_not_ready(view: ClusterView, instances: tuple[Instance, ...]) -> SkulkError:
    """The error for a model none of whose instances is ready: the most hopeful of them speaks."""
    assert instances, "nothing is placed"
    by_phase = {phase_of(view, instance): instance for instance in reversed(instances)}
    for phase in ("loading", "placing"):
        if phase in by_phase:
            return _loading(view, by_phase[phase])
    if "pending" in by_phase:
        instance = by_phase["pending"]
        return UnavailableError(
            "instance_not_ready",
            f"the instance {instance.instance_id} of {instance.model_id} has no node: "
            f"{instance.reason or 'none was chosen yet'}",
            retry_after_s=RETRY_PENDING_S,
        )
    instance = by_phase.get("failed") or instances[0]
    status = runner_of(view, instance)
    error = None if status is None else status.error
    reason = "no reason is known; see the node's log" if error is None else error.detail
    return ServiceError(
        "runner_failed",
        f"the instance {instance.instance_id} of {instance.model_id} can't run: {reason}",
        retry_after_s=None if error is None else error.retry_after_s,
    )


def loading_of(view: ClusterView, instance: Instance) -> Loading:
    """How far an instance's load is."""
    status, model_id, total = runner_of(view, instance), instance.model_id, instance.request.card.size_bytes
    if status is None or instance.assignment is None:
        return Loading(model=model_id, phase="placing", done=0, total=total)
    node = view.nodes.get(instance.assignment.node_id)
    coming = () if node is None else node.beat.downloads
    fetched = next((one for one in coming if one.model_id == model_id and one.phase in _COMING), None)
    if status.phase == "accepted" and fetched is not None:
        return Loading(model=model_id, phase="downloading", done=fetched.done_bytes, total=fetched.total_bytes)
    done = round(total * status.progress)
    return Loading(model=model_id, phase="warming" if status.phase == "warming" else "loading", done=done, total=total)


def _loading(view: ClusterView, instance: Instance) -> LoadingError:
    status = runner_of(view, instance)
    state = "is being placed" if status is None else f"is {status.phase}, {status.progress:.0%} done"
    return LoadingError(
        f"the instance {instance.instance_id} of {instance.model_id} {state}; ask again in a moment",
        loading_of(view, instance),
    )


def has_crashed(view: ClusterView, known: RunnerStatus) -> bool:
    """Whether a runner that was ready ended by itself, as its supervisor says; not: stopped, or lost with its node."""
    status = view.runners.get(known.runner_id)
    return status is not None and (status.phase == "failed" or status.restarts > known.restarts)


def death_of(view: ClusterView, known: RunnerStatus) -> ServiceError | None:
    """Why a runner that was ready is dead by the view's word; None while it lives."""
    status = view.runners.get(known.runner_id)
    name = f"the runner {known.runner_id}"
    if status is None:
        return ServiceError("runner_failed", f"{name} is gone: it was stopped, or its node {known.node_id} was lost")
    if status.phase in ("failed", "refused", "stopped"):
        # a supervisor's sentence names the runner itself
        return ServiceError("runner_failed", f"{name} was stopped" if status.error is None else status.error.detail)
    if status.restarts > known.restarts:
        return ServiceError("runner_failed", f"{name} died and was started again; send the request again")
    return None
