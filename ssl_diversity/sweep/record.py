"""What `runs/<sweep>/sweep.yaml` remembers of the runs of a sweep: always something that can be planned."""

from collections.abc import Callable

from omegaconf import OmegaConf

from ssl_diversity.errors import UserError
from ssl_diversity.files import write_atomic
from ssl_diversity.sweep.config import SweepConfig, recorded
from ssl_diversity.sweep.plan import expand


def remember(
    sweep: SweepConfig, *, ended: bool = False, tell: Callable[[str], None] = lambda text: None
) -> SweepConfig:
    """Add this run to the record of its sweep; returns the record, which the report shows.

    Earlier budgets and downstream sets stay, but `tell` hears of those that cannot be planned beside this
    run's; they are dropped. Downstream sets that could not be prepared are dropped when the run has `ended`:
    they may never work, and another run can ask for them again.
    """
    old = recorded(sweep.name)
    budgets, downstream = (old.budget, old.kept_downstream()) if old else ((), {})
    if ended:
        sweep = sweep.model_copy(update={"downstream": sweep.kept_downstream() or sweep.downstream})
    record = sweep
    for name in reversed([name for name in downstream if name not in sweep.downstream]):
        wider = {**{name: downstream[name]}, **record.downstream}
        record = _if_planned(record, {"downstream": wider}, f"downstream set {name}", tell)
    for budget in [budget for budget in budgets if budget not in sweep.budget]:
        record = _if_planned(record, {"budget": (*record.budget, budget)}, f"budget={budget}", tell)
    in_order = dict.fromkeys((*budgets, *sweep.budget))
    record = record.model_copy(update={"budget": tuple(b for b in in_order if b in record.budget)})
    text = OmegaConf.to_yaml(OmegaConf.create(record.model_dump(mode="json")))
    write_atomic(record.folder / "sweep.yaml", text)
    return record


def _if_planned(
    record: SweepConfig, update: dict[str, object], what: str, tell: Callable[[str], None]
) -> SweepConfig:
    wider = record.model_copy(update=update)
    try:
        expand(wider)
    except UserError as error:
        tell(f"{record.name}: {what} of an earlier run is no longer in the record: {error}")
        return record
    return wider
