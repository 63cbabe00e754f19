"""Which node serves a model, with a report on every node: the same value for reply, preview, CLI and log.

    place(view, request, now)
     1. the request can't be met by any node ................ unplaceable, said in one sentence, nodes not looked at
     2. each node, by id, through the filters; the first that holds is its report:
          a. lost, suspect      silent for 3 s or more
          b. incompatible       another major version of the bus contract
          c. management         it runs no models
          d. excluded           named in excluded_nodes, by id or name
          e. not_selected       node_ids is given and doesn't name it
          f. draining
          g. facts_pending      it hasn't measured its memory yet
          h. backend_mismatch   the card accepts none of its tags
          i. weights_missing    the weights aren't on its disk, and it can't fetch them (`placement.weights`)
          j. memory             its GPU has less than the card's min_vram_gib; or not even the smallest context that
                                may be admitted fits. Beside a discrete GPU the processor is tried next, where the
                                card accepts it. A request with ``force`` passes this one, with a warning
        else it can serve: context, cells and memory that it would get, and a score
     3. some can serve ...................................... placed on the best score, ties by node id
     4. no node is live, or one that passed f. still measures  pending: it may succeed in seconds
     5. ..................................................... unplaceable: what came nearest, and what to do

Score, compared in this order:
    fits      only where ``force`` was asked for: 1 where the memory suffices, else 0
    backend   minus its rank in the card
    weights   1: on its disk
    apart     minus the instances of this model that are there already
    speed     tokens a second to be expected, in doublings (`placement.speeds`)
    room      share of the room left over, in tenths, so that noise doesn't decide
    load      minus load a core, in tenths
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple

from skulk.cluster.liveness import node_liveness
from skulk.cluster.view import ClusterView, NodeView, drain_of
from skulk.ids import runner_id
from skulk.placement.backends import Ranked, rank_of
from skulk.placement.fitting import Fit, Fitter, context_limit, largest_context, least_fit, least_need
from skulk.placement.rooms import is_on_cpu, rooms
from skulk.placement.speeds import doublings, expected_tps, usual_tps
from skulk.placement.weights import sources_of, why_not_fetched
from skulk.units import GIB, format_bytes
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import EngineFacts
from skulk.wire.placement import MemoryEstimate, NodeReport, PlacementDecision, PlacementRequest
from skulk.wire.state import Assignment

DEFAULT_PARALLEL: Final = 16
MAX_PARALLEL: Final = 256
SERVED_TASKS: Final = frozenset({"TextGeneration", "TextEmbedding"})
"""``LLAMA_MAX_SEQ``: a llama.cpp context holds no more sequences."""
NAMED_NODES: Final = 5
"""The most nodes that a reason names one by one; the reports have them all."""

_FILTERS: Final = (
    "lost",
    "suspect",
    "incompatible",
    "management",
    "excluded",
    "not_selected",
    "draining",
    "facts_pending",
    "backend_mismatch",
    "weights_missing",
    "memory",
)
_REMEDIES: Final = {
    "lost": "Bring a node back",
    "suspect": "Bring a node back",
    "incompatible": "Bring the nodes to one version",
    "management": "Start a node that runs models (without --no-worker)",
    "excluded": "Exclude fewer nodes",
    "not_selected": "Select other nodes",
    "draining": "Wait until the drain has ended",
    "facts_pending": "Try again in a few seconds",
    "backend_mismatch": "Add a node with an accepted backend, or look at the warnings of 'skulk nodes'",
    "weights_missing": "Put the model's files where SKULK_MODELS_PATH of a node looks, or free disk space there",
    "memory": "Free memory, ask for a smaller context_length or n_parallel, or take a smaller quantization",
}


class _Verdict(NamedTuple):
    """A filter's name and its numbers."""

    filter: str
    detail: str


def place(
    view: ClusterView,
    request: PlacementRequest,
    now: float,
    *,
    default_parallel: int = DEFAULT_PARALLEL,
) -> PlacementDecision:
    """Decides; changes nothing. Equal input, equal output; the order of nodes in the view is irrelevant.

    Args:
        view: state and beats as the master has them.
        request: what was asked for.
        now: seconds on the clock of the view's ``heard_at``.
        default_parallel: sequences side by side where the request doesn't say.

    Cost: O(instances + nodes).
    """
    # 1.
    impossible = _impossible(request)
    if impossible:
        return PlacementDecision(outcome="unplaceable", reason=impossible, reports=_unjudged(view, impossible))
    # 2.
    question = _Question(view, request, now, default_parallel)
    reports = tuple(_report(question, view.nodes[node_id]) for node_id in sorted(view.nodes))
    fitting = [report for report in reports if report.filter is None]
    # 3.
    if fitting:
        best = max(fitting, key=lambda report: tuple(report.score.values()))  # of equals the first: by id
        return PlacementDecision(
            outcome="placed", nodes=(best.node_id,), reports=reports, reason=_placed_reason(request, best)
        )
    # 4.
    waiting = _waiting_for(reports)
    if waiting:
        return PlacementDecision(outcome="pending", reports=reports, reason=waiting)
    # 5.
    return PlacementDecision(outcome="unplaceable", reports=reports, reason=_unplaceable_reason(request, reports))


def assign(decision: PlacementDecision, instance_id: str, epoch: int) -> Assignment:
    """The assignment that a decision stands for; ``epoch`` is one more than the instance's last."""
    assert decision.outcome == "placed", f"nothing to assign: {decision.reason}"
    report = decision.report_of(decision.nodes[0])
    assert report is not None
    assert report.backend is not None
    assert report.memory is not None
    return Assignment(
        epoch=epoch,
        node_id=report.node_id,
        runner_id=runner_id(instance_id, epoch),
        backend=report.backend,
        context_length=report.context_length,
        n_parallel=report.n_parallel,
        kv_cells=report.kv_cells,
        memory=report.memory,
    )


def _impossible(request: PlacementRequest) -> str:
    """Step 1: why no node of any cluster could meet this; empty where one could."""
    card = request.card
    if request.min_nodes > 1:
        engine = "llama.cpp" if card.format == "gguf" else "this version"
        return f"{card.model_id} can't be spread over {request.min_nodes} nodes: {engine} serves it on one; send 1."
    if request.min_nodes < 1:
        return f"min_nodes is {request.min_nodes}; send 1."
    if request.n_parallel is not None and not 1 <= request.n_parallel <= MAX_PARALLEL:
        return f"n_parallel is {request.n_parallel}; it must lie between 1 and {MAX_PARALLEL}."
    asked, limit = request.context_length, context_limit(card)
    if asked is not None and not 1 <= asked <= limit:
        return f"context_length is {asked:,}; {card.model_id} takes 1 to {limit:,} tokens."
    if not SERVED_TASKS.intersection(card.tasks):
        return (
            f"{card.model_id} answers with {', '.join(card.tasks) or 'nothing'}, not with text or embeddings; choose "
            "another model."
        )
    if not card.backends:
        return f"The card of {card.model_id} accepts no backend; name at least one in its 'backends'."
    return ""


def _unjudged(view: ClusterView, reason: str) -> tuple[NodeReport, ...]:
    """Reports where the request itself is refused: every node has one all the same."""
    return tuple(
        NodeReport(node_id=node_id, name=view.nodes[node_id].beat.name, filter="request", detail=reason)
        for node_id in sorted(view.nodes)
    )


class _Question:
    """What all nodes are asked alike, worked out once."""

    def __init__(self, view: ClusterView, request: PlacementRequest, now: float, default_parallel: int) -> None:
        self.view: Final = view
        self.request: Final = request
        self.now: Final = now
        self.rooms: Final = rooms(view)
        self.fitter: Final = Fitter(request.card, request.context_length, is_capped=request.n_parallel is None)
        self.sources: Final = sources_of(view, request.card)
        self.excluded: Final = frozenset(request.excluded_nodes)
        self.selected: Final = frozenset(request.node_ids)
        asked = request.n_parallel
        self.widths: Final = _narrower(default_parallel) if asked is None else (asked,)
        model_id = request.card.model_id
        same = [found for found in view.state.instances.values() if found.request.card.model_id == model_id]
        self.there: Final[Mapping[str, int]] = dict(
            Counter(found.assignment.node_id for found in same if found.assignment is not None)
        )
        self._least: dict[tuple[str, EngineFacts], MemoryEstimate] = {}
        self.is_picky: Final = bool(request.excluded_nodes or request.node_ids or view.state.drains)
        self._mismatches: dict[tuple[str, ...], str] = {}
        self._ranks: dict[tuple[str, ...], Ranked | None] = {}
        self._cpu_ranks: dict[tuple[str, ...], Ranked | None] = {}
        self._usual: dict[str, float] = {}

    def cpu_rank_of(self, tags: tuple[str, ...]) -> Ranked | None:
        """`rank_of` among the tags that compute on the processor."""
        if tags not in self._cpu_ranks:
            self._cpu_ranks[tags] = self.rank_of(tuple(tag for tag in tags if is_on_cpu(tag)))
        return self._cpu_ranks[tags]

    def mismatch_of(self, tags: tuple[str, ...]) -> str:
        """Why none of a node's tags will do."""
        if tags not in self._mismatches:
            offered = ", ".join(tag for tag in tags if "-" in tag) or "nothing"
            self._mismatches[tags] = f"needs {' or '.join(self.request.card.backends)}, offers {offered}"
        return self._mismatches[tags]

    def least_need(self, backend: str, engine: EngineFacts) -> MemoryEstimate:
        """What the smallest context takes there; nodes of one kind need the same."""
        found = self._least.get((backend, engine))
        if found is None:
            asked, width = self.request.context_length, self.widths[-1]
            found = least_need(self.request.card, asked, width, backend, engine)
            self._least[backend, engine] = found
        return found

    def speed_on(self, node: NodeView, backend: str) -> float:
        """Tokens a second to be expected there, in doublings."""
        weights = self.request.card.weights_bytes
        if node.beat.speeds:
            return doublings(expected_tps(weights, backend, node.beat.speeds))
        if backend not in self._usual:
            self._usual[backend] = doublings(usual_tps(weights, backend))
        return self._usual[backend]

    def rank_of(self, tags: tuple[str, ...]) -> Ranked | None:
        """The card's best backend among a node's; nodes of one kind have the same tags."""
        if tags not in self._ranks:
            self._ranks[tags] = rank_of(self.request.card.backends, tags)
        return self._ranks[tags]


def _report(question: _Question, node: NodeView) -> NodeReport:
    """Step 2 for one node."""
    request = question.request
    verdict = _absent(question, node)  # a. to c.
    if verdict is None and question.is_picky:
        verdict = _unwanted(question, node)  # d. to f.
    if verdict is None and node.beat.memory.total_bytes <= 0:  # g.
        verdict = _Verdict("facts_pending", "hasn't measured its memory yet")
    ranked = question.rank_of(node.beat.tags)
    short = ""
    if verdict is None and ranked is None:  # h.
        verdict = _Verdict("backend_mismatch", question.mismatch_of(node.beat.tags))
    elif verdict is None and (missing := why_not_fetched(question.sources, request.card, node)):  # i.
        verdict = _Verdict("weights_missing", missing)
    elif verdict is None and ranked is not None and request.card.min_vram_gib:  # j.
        short = _small_gpu(request, node, ranked.backend)
        verdict = _Verdict("memory", short) if short and not request.force else None
    if verdict is not None:
        return NodeReport(
            node_id=node.beat.node_id,
            name=node.beat.name,
            filter=verdict.filter,
            detail=verdict.detail,
            backend=None if ranked is None else ranked.backend,
        )
    assert ranked is not None
    report = _sized(question, node, ranked, short)  # j.
    if report.filter is None or node.beat.node_id not in question.rooms.cpu or is_on_cpu(ranked.backend):
        return report
    on_cpu = None if request.card.min_vram_gib else question.cpu_rank_of(node.beat.tags)
    other = None if on_cpu is None else _sized(question, node, on_cpu, "")
    return report if other is None or other.filter is not None else other


def _absent(question: _Question, node: NodeView) -> _Verdict | None:
    silent_s = question.now - node.heard_at
    liveness = node_liveness(silent_s)
    if liveness != "live":  # a.
        return _Verdict(liveness, f"silent for {silent_s:.1f} s")
    if node.beat.protocol != PROTOCOL:  # b.
        return _Verdict("incompatible", f"speaks version {node.beat.protocol} of the bus contract, not {PROTOCOL}")
    if node.beat.role == "management":  # c.
        return _Verdict("management", "runs no models")
    return None


def _unwanted(question: _Question, node: NodeView) -> _Verdict | None:
    node_id, name = node.beat.node_id, node.beat.name
    if question.excluded and (node_id in question.excluded or name in question.excluded):  # d.
        return _Verdict("excluded", "named in excluded_nodes")
    if question.selected and node_id not in question.selected and name not in question.selected:  # e.
        return _Verdict("not_selected", f"node_ids names only {', '.join(question.request.node_ids)}")
    drain = drain_of(question.view, node_id)
    if drain is not None:  # f.
        return _Verdict("draining", drain.reason or "takes no new work")
    return None


def _small_gpu(request: PlacementRequest, node: NodeView, backend: str) -> str:
    """Why a node's GPU is too small for what the card asks for; empty: it isn't, or the card asks for nothing.

    A unified one counts with what it maps of main memory; a Mac's is its main memory.
    """
    asked = int(request.card.min_vram_gib * GIB)
    gpus = node.beat.system.accelerators
    if backend.endswith("-cpu"):
        have = 0
    elif backend.endswith("-metal"):
        have = node.beat.memory.total_bytes
    else:
        have = sum(max(gpu.vram_total_bytes, gpu.gtt_total_bytes) for gpu in gpus)
    return (
        ""
        if have >= asked
        else f"its card asks for {format_bytes(asked)} of GPU memory, {backend} has "
        + (format_bytes(have) if have else "none")
    )


def _sized(question: _Question, node: NodeView, ranked: Ranked, warning: str) -> NodeReport:
    """Filter j., and the score of what passes it; ``warning``: what was let pass before."""
    have = question.rooms.of(node.beat.node_id, ranked.backend)
    card, asked = question.request.card, question.request.context_length
    fit, smaller = _widest(question, node, ranked.backend, have)
    if fit is None:
        need = question.least_need(ranked.backend, node.beat.engine)
        short = f"memory need {format_bytes(need.need_bytes)} have {format_bytes(have)}{_offer(smaller)}"
        if not question.request.force:
            return NodeReport(
                node_id=node.beat.node_id,
                name=node.beat.name,
                backend=ranked.backend,
                available_bytes=have,
                filter="memory",
                detail=short,
                memory=need,
            )
        fit = least_fit(card, asked, question.widths[-1], ranked.backend, node.beat.engine)
        warning = short
    return NodeReport(
        node_id=node.beat.node_id,
        name=node.beat.name,
        backend=ranked.backend,
        available_bytes=have,
        context_length=fit.context_length,
        n_parallel=fit.n_parallel,
        kv_cells=fit.kv_cells,
        memory=fit.memory,
        score=_score(question, node, ranked, fit, have, fits=not warning),
        warning=f"{node.beat.name or node.beat.node_id}: forced though {warning}" if warning else "",
    )


def _widest(question: _Question, node: NodeView, backend: str, have: int) -> tuple[Fit | None, Fit | None]:
    """What was asked for with the most sequences side by side that fit; where nothing does, the smaller one beside."""
    fitter, widths, engine = question.fitter, question.widths, node.beat.engine
    if have < fitter.least_bytes(backend):
        return None, None
    fit: Fit | None = None
    for width in widths:
        fit = fitter.fit(have, width, backend, engine)
        if fit is not None and (question.request.context_length is None or fit.context_length >= fitter.most):
            return fit, None
        # where one sequence has no room, two have none
        if fit is None and width == widths[0] and fitter.fit(have, widths[-1], backend, engine) is None:
            return None, None
    return None, fit


def _narrower(n_parallel: int) -> tuple[int, ...]:
    """From so many sequences side by side down to one, by halves: fewer where memory says so."""
    return tuple(n_parallel >> halvings for halvings in range(n_parallel.bit_length()))


def _offer(fit: Fit | None) -> str:
    return "" if fit is None else f"; a context_length of {fit.context_length:,} would fit"


def _score(question: _Question, node: NodeView, ranked: Ranked, fit: Fit, have: int, *, fits: bool) -> dict[str, float]:
    need = fit.memory.need_bytes
    left = (have - need) / max(have, need)
    load = node.beat.load / max(1, node.beat.system.physical_cores)
    node_id = node.beat.node_id
    score = {
        "backend": float(-ranked.rank),
        "weights": 1.0 if node_id in question.sources.holders else 0.0,
        "apart": 0.0 - question.there.get(node_id, 0),
        "speed": question.speed_on(node, ranked.backend),
        "room": math.floor(left * 10.0 + 0.5) / 10.0,
        "load": 0.0 - math.floor(load * 10.0 + 0.5) / 10.0,
    }
    return {"fits": 1.0 if fits else 0.0, **score} if question.request.force else score


def _placed_reason(request: PlacementRequest, best: NodeReport) -> str:
    assert best.memory is not None
    limit = largest_context(request.card, request.context_length)
    shorter = f" (of {limit:,}: more doesn't fit)" if best.context_length < limit else ""
    warned = f" Warning: {best.warning}." if best.warning else ""
    return (
        f"{request.card.model_id} goes to {best.name or best.node_id} on {best.backend}: "
        f"memory need {format_bytes(best.memory.need_bytes)} have {format_bytes(best.available_bytes)}, "
        f"context {best.context_length:,} tokens{shorter}, {best.n_parallel} side by side in {best.kv_cells:,} cells."
        f"{warned}"
    )


def _waiting_for(reports: tuple[NodeReport, ...]) -> str:
    """Step 4: what the caller may wait for; empty where waiting won't help."""
    if all(report.filter in ("lost", "suspect") for report in reports):
        return "No node has been heard yet: the facts are still arriving, try again in a few seconds."
    pending = [report.name or report.node_id for report in reports if report.filter == "facts_pending"]
    if pending:
        return f"{', '.join(pending[:NAMED_NODES])}: still measuring memory, try again in a few seconds."
    return ""


def _unplaceable_reason(request: PlacementRequest, reports: tuple[NodeReport, ...]) -> str:
    """Step 5: the nodes that came furthest through the filters, and what would help there."""
    furthest = max(reports, key=_depth).filter
    assert furthest is not None
    near = [report for report in reports if report.filter == furthest]
    named = "; ".join(f"{report.name or report.node_id}: {report.detail}" for report in near[:NAMED_NODES])
    more = f"; and {len(near) - NAMED_NODES} more" if len(near) > NAMED_NODES else ""
    others = len(reports) - len(near)
    rest = f" (ruled out before that: {others})" if others else ""
    nodes = "the only node" if len(reports) == 1 else f"none of {len(reports)} nodes"
    verb = "doesn't fit on" if len(reports) == 1 else "fits on"
    return f"{request.card.model_id} {verb} {nodes}: {named}{more}{rest}. {_REMEDIES[furthest]}."


def _depth(report: NodeReport) -> int:
    assert report.filter is not None
    return _FILTERS.index(report.filter)
