"""What is left, followed look by look, is what is left when one asks anew."""

import shutil
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssl_diversity.sweep import config, store
from ssl_diversity.sweep.config import DistanceConfig
from ssl_diversity.sweep.plan import Plan
from ssl_diversity.sweep.remaining import Left, Remaining, gave_up, left
from ssl_diversity.sweep.store import Done, Index, store_dir
from ssl_diversity.sweep.task import Task

ATTEMPTS = 2


def obvious(plan: Plan, done: Done, retried: frozenset[tuple[str, str]]) -> Left:
    """One pass over all tasks: needs come before what needs them."""
    out: dict[str, list[Task]] = {"ready": [], "later": [], "failed": [], "blocked": []}
    dead = set()
    for task in plan.tasks:
        if task in done:
            continue
        behind = any(need.id in dead for need in task.needs)
        marked = task.key in Index("failed").keys(task.kind) and task.id not in retried
        if behind or (marked and gave_up(task, 0.0, ATTEMPTS, 1)):
            out["blocked" if behind else "failed"].append(task)
            dead.add(task.id)
        else:
            out["ready" if done.all(task.needs) else "later"].append(task)
    return Left(**{name: tuple(tasks) for name, tasks in out.items()})


def plan_of(tasks: tuple[Task, ...]) -> Plan:
    return Plan(config.load("quickstart"), (), (), (), (), {}, tasks, ())


def chain(home: Path) -> tuple[Task, ...]:
    """Two pools, three cells that need one or both, two probes of each cell, and a task whose need is not planned."""
    pools = [
        Task("prepare", DistanceConfig(n=n), output=home / "pools" / str(n) / "pool.json") for n in (2, 3)
    ]
    strange = Task("distance", DistanceConfig(n=4))
    tasks = [*pools]
    for n, needs in ((10, pools[:1]), (20, pools), (30, pools[1:])):
        cell = Task("pretrain", DistanceConfig(n=n), tuple(needs))
        tasks += [cell, *(Task("probe", DistanceConfig(n=n + i), (cell, pools[0])) for i in (1, 2))]
    return (*tasks, Task("distance", DistanceConfig(n=5), (strange,)))


def happen(event: str, task: Task) -> None:
    match event:
        case "done" if task.output:
            task.output.parent.mkdir(parents=True, exist_ok=True)
            task.output.touch()
        case "undone" if task.output:
            task.output.unlink(missing_ok=True)
        case "done":
            Done().add(task.kind, task.key)
        case "undone":
            Done().discard(task.kind, task.key)
        case "fail":
            store.fail(task, "ValueError: made to fail")
        case "refuse":
            store.fail(task, "UserError: made to refuse")
        case "forgive":
            Index("failed").discard(task.kind, task.key)
            shutil.rmtree(task.folder, ignore_errors=True)


EVENTS = st.tuples(
    st.sampled_from(["done", "done", "undone", "fail", "refuse", "forgive"]),
    st.integers(0, 12),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(EVENTS, max_size=25))
@example(events=[("done", 12, False), ("undone", 12, False)])  # a need that is not in the plan
def test_every_look_is_the_one_that_asks_anew(home: Path, events: list[tuple[str, int, bool]]) -> None:
    shutil.rmtree(store_dir(), ignore_errors=True)
    shutil.rmtree(home / "pools", ignore_errors=True)
    tasks = chain(home)
    plan = plan_of(tasks)
    named = (*tasks, tasks[-1].needs[0])
    done, remaining = Done(), Remaining(since=0.0, max_attempts=ATTEMPTS)
    for event, number, retry in events:
        task = named[number]
        happen(event, task)
        done.refresh()
        retried = frozenset({task.id}) if retry else frozenset()
        found = remaining.look(plan, done, retried)
        assert found == obvious(plan, Done(), retried)
        assert found == left(plan, Done(), since=0.0, max_attempts=ATTEMPTS, retried=retried)
        open_ = {t.key for t in (*found.ready, *found.later, *found.failed, *found.blocked)}
        assert {t.key for t in tasks if remaining.is_open(t.key)} == open_


def test_another_plan_is_looked_at_anew(home: Path) -> None:
    tasks = chain(home)
    remaining = Remaining(since=0.0, max_attempts=ATTEMPTS)
    assert remaining.look(plan_of(tasks[:1]), Done()).ready == tasks[:1]
    found = remaining.look(plan_of(tasks), Done())
    assert found.ready == tasks[:2]
    assert found.later == tasks[2:]
