"""A process that works off sample and generate tasks."""

import subprocess
import sys
from typing import Any


def working(environment: dict[str, str], *tasks: Any) -> subprocess.Popen[bytes]:
    """A process that works off `tasks` in turn."""
    code = (
        "import sys; from pathlib import Path; from ssl_diversity.runtime import Runtime\n"
        "from ssl_diversity.generation.assembly import generate\n"
        "from ssl_diversity.generation.chunks import sample\n"
        "from ssl_diversity.generation.sampling import GenerateSpec, SampleSpec\n"
        "for text in sys.argv[1:]:\n"
        "    kind, do = (SampleSpec, sample) if 'first_block' in text else (GenerateSpec, generate)\n"
        "    do(kind.model_validate_json(text), Path('unused'), Runtime())"
    )
    command = [sys.executable, "-c", code, *(task.model_dump_json() for task in tasks)]
    return subprocess.Popen(command, env=environment)
