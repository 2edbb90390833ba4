"""What a cluster would answer to a profile, before anything is submitted."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_diversity import files
from ssl_diversity.errors import UserError
from ssl_diversity.sweep import slurm
from ssl_diversity.sweep.profile import MAIN, Profile, SlurmProfile
from ssl_diversity.sweep.status import duration

FINE, NOTE, WRONG = "ok", "note", "wrong"


@dataclass(frozen=True)
class Finding:
    """One answer: `ok`, a `note` on what works differently here, or `wrong`, with the remedy."""

    level: str
    subject: str
    text: str


def check(profile: Profile) -> Iterator[Finding]:
    """What is right and wrong with running a sweep by this profile, from here."""
    if not isinstance(profile, SlurmProfile):
        workers, threads = profile.layout()
        yield Finding(
            FINE, "workers", f"{workers} of {profile.ranks} processes with {threads} threads each, here"
        )
        return
    try:
        told = slurm.configuration()
    except slurm.NoAnswer as error:
        yield Finding(WRONG, "controller", f"{error}; is this a login node, and SLURM_CONF right?")
        return
    yield Finding(FINE, "controller", f"{told.get('ClusterName')}, SLURM {told.get('SLURM_VERSION')}")
    yield from _accounting()
    yield from _requeue(profile, told)
    yield from _limits(profile, told)
    yield from _home()
    for name in profile.classes_of_workers:
        yield from _workers(profile.of(name), "workers" if name == MAIN else f"workers of class {name}")


def _accounting() -> Iterator[Finding]:
    try:
        slurm.ask("sacct", "--allocations", "--noheader", "--starttime=now")
        yield Finding(FINE, "accounting", "sacct answers: how a lost worker ended is known for sure")
    except slurm.NoAnswer as error:
        text = f"sacct does not answer ({error}): causes of losses are taken from the controller, or stay unknown"
        yield Finding(NOTE, "accounting", text)


def _requeue(profile: SlurmProfile, told: Any) -> Iterator[Finding]:
    if not profile.requeue:
        yield Finding(NOTE, "requeue", "off in the profile: a worker that must stop is replaced by another")
    elif told.get("JobRequeue") == "0":
        text = "jobs ask for it one by one (JobRequeue=0 here, sbatch --requeue overrides it)"
        yield Finding(FINE, "requeue", text)
    else:
        yield Finding(FINE, "requeue", "allowed")
    if (
        "preempt_send_user_signal" not in told.get("SlurmctldParameters", "")
        and told.get("PreemptMode") != "OFF"
    ):
        text = f"no user signal before a preemption: workers save on SIGTERM, within KillWait={told.get('KillWait')}"
        yield Finding(NOTE, "preemption", text)


def _limits(profile: SlurmProfile, told: Any) -> Iterator[Finding]:
    largest = slurm.largest_array()
    for name in profile.classes_of_workers:
        workers = profile.of(name).workers
        if workers > largest:
            text = f"{workers} workers are more than MaxArraySize={largest}: sent as {-(-workers // largest)} arrays"
            yield Finding(NOTE, "arrays", text)
    yield Finding(FINE, "arrays", f"up to {largest} elements")
    for what, most in _submit_limits():
        wanted = sum(profile.of(name).workers for name in profile.classes_of_workers)
        level = FINE if wanted <= most else NOTE
        text = f"{what}: {most} jobs at a time for {wanted} workers"
        yield Finding(level, "submit limit", text + ("" if wanted <= most else "; the sweep runs with fewer"))


def _submit_limits() -> Iterator[tuple[str, int]]:
    asked = (
        ("account", ("show", "assoc", f"user={_user()}", "format=account,maxsubmit")),
        ("qos", ("show", "qos", "format=name,maxsubmitpu")),
    )
    for what, words in asked:
        try:
            lines = slurm.ask("sacctmgr", "--noheader", "--parsable2", *words).splitlines()
        except slurm.NoAnswer:
            continue
        for line in lines:
            name, most = line.split("|")[:2]
            if most.isdecimal():
                yield f"{what} {name}", int(most)


def _user() -> str:
    import getpass

    return getpass.getuser()


def _home() -> Iterator[Finding]:
    home = files.home()
    local = any(str(home).startswith(place) for place in (tempfile.gettempdir(), "/dev/shm"))
    text = f"{home}" + (": must be seen by every node; temporary folders seldom are" if local else "")
    yield Finding(NOTE if local else FINE, "store", text)


def _workers(own: SlurmProfile, subject: str) -> Iterator[Finding]:
    try:
        partition = slurm.shown("partition", own.partition or _default_partition())
    except slurm.NoAnswer as error:
        yield Finding(
            WRONG, subject, f"partition={own.partition}: {error}; known: {', '.join(_partitions())}"
        )
        return
    name = partition["PartitionName"]
    if partition.get("State") != "UP":
        yield Finding(
            WRONG,
            subject,
            f"partition {name} is {partition.get('State')}; choose one of {', '.join(_partitions())}",
        )
    most_s = slurm.parse_duration(partition.get("MaxTime", ""))
    if most_s is not None and own.time_min * 60 > most_s:
        text = (
            f"time_min={own.time_min}: partition {name} allows {int(most_s // 60)}; jobs would wait for ever"
        )
        yield Finding(WRONG, subject, text)
    most_nodes = partition.get("MaxNodes", "")
    if most_nodes.isdecimal() and own.nodes > int(most_nodes):
        yield Finding(
            WRONG,
            subject,
            f"nodes={own.nodes}: partition {name} allows {most_nodes}; jobs would wait for ever",
        )
    may = partition.get("AllocNodes", "ALL")
    if own.successors and may != "ALL":
        text = f"jobs may be submitted from {may} alone: set successors: false and keep `status --watch` running there"
        yield Finding(NOTE, subject, text)
    try:
        own.require_torch()
    except UserError as error:
        yield Finding(WRONG, subject, str(error))
    if own.container and (own.requeue or own.successors):
        yield from _container(own.container, subject)
    try:
        answer = _test_only(own)
    except subprocess.TimeoutExpired:
        yield Finding(WRONG, subject, "sbatch --test-only does not answer; try again later")
        return
    if answer.returncode:
        told = " ".join((answer.stderr or answer.stdout).replace("sbatch: error:", "").split())
        yield Finding(WRONG, subject, f"sbatch would refuse them: {told}; change the profile")
    else:
        each = f"{own.nodes} x {own.ranks} x {own.cpus} CPUs, {duration(own.time_min * 60)}"
        when = answer.stderr.partition("to start at ")[2].split()[:1] or ["soon"]
        yield Finding(
            FINE,
            subject,
            f"{own.workers} of {each} each in partition {name}; the first would start at {when[0]}",
        )


def _container(container: str, subject: str) -> Iterator[Finding]:
    """Whether workers in a container could speak to SLURM: they requeue themselves and send others."""
    try:
        slurm.ask(*shlex.split(container), "squeue", "--version")
    except slurm.NoAnswer as error:
        text = f"no squeue in the container ({error}): bind SLURM's commands, slurm.conf and munge's socket, or set"
        yield Finding(WRONG, subject, f"{text} requeue: false and successors: false and watch from outside")


def _test_only(own: SlurmProfile) -> "subprocess.CompletedProcess[str]":
    """What sbatch says to the very script that a sweep would send."""
    import submitit

    with tempfile.TemporaryDirectory() as folder, slurm.outside_of_job():
        sender = submitit.AutoExecutor(folder=folder, cluster="slurm")
        sender.update_parameters(**own.parameters("check"))
        script = Path(folder) / "check.sh"
        script.write_text(sender._executor._make_submission_file_text("true", "check"))
        command = ["sbatch", "--test-only", str(script)]
        environment = dict(os.environ)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=environment
        )


def _default_partition() -> str:
    for line in slurm.ask("sinfo", "--noheader", "--format=%P").split():
        if line.endswith("*"):
            return line[:-1]
    raise slurm.NoAnswer("the cluster has no default partition: set partition")


def _partitions() -> list[str]:
    try:
        return sorted({name.rstrip("*") for name in slurm.ask("sinfo", "--noheader", "--format=%P").split()})
    except slurm.NoAnswer:
        return []
