"""torch.compile for a method's networks, where there is a compiler that works."""

import os

import torch
from torch import nn

from ssl_diversity.methods.base import Method

SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


def compile_networks(module: Method, device: str, threads: int) -> str:
    """Have the backbone and its teachers compiled at their first batch; "", or why they stay as they are.

    Shapes are fixed: one compilation for each size of view. Parameters and state dicts keep their names. What was
    compiled for earlier cells is dropped: there is a bound on it, beyond which nothing more is compiled.
    """
    if why := _broken(device, threads):
        return why
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled after all runs as it is
    for network in (module.backbone, *(teacher for _, teacher in module.followers)):
        if type(network) is type(module.backbone):
            network.compile(dynamic=False)
    module.compiled = True
    return ""


def _broken(device: str, threads: int) -> str:
    """What keeps torch from compiling anything for a device, if anything does."""
    if off := [name for name in SWITCHES if os.environ.get(name) == "1"]:
        return f"{off[0]}=1"
    try:
        from torch._inductor import config

        config.compile_threads = threads  # no more processes than the task may use
        torch.compiler.reset()
        torch._dynamo.config.suppress_errors = False
        torch.compile(nn.functional.gelu)(torch.ones(64, device=device))
    except Exception as error:  # of any of its parts: no compiler, no headers, no room for its files
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""
