"""`vi-simsiam info|bench`: the installation, and benchmarks."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from vi_simsiam.cli.commands import BENCHMARKS
from vi_simsiam.cli.parsing import parse
from vi_simsiam.errors import none_of


@dataclass(frozen=True)
class _Info:
    json: bool = False
    """Print it as JSON, for programs."""
    check: bool = False
    """Also check each kernel and a training step against a reference; exit code 1 on an error."""


def info(arguments: list[str]) -> int:
    """Print versions, devices and backends."""
    options = parse("info", _Info, arguments)

    from vi_simsiam.info import facts, report

    def show(text: str, end: str = "\n") -> None:
        if not options.json:
            print(text, end=end, flush=True)  # a check may take long to compile, or end the process

    found = facts()
    show(report(found))
    checks = []
    if options.check:
        from vi_simsiam.self_check import run_checks, summary

        for check in run_checks(found["backends"], begin=lambda name: show(f"{name:46} ", end="")):
            checks.append(check)
            show(check.verdict())
        show(summary(checks))
        found["checks"] = [asdict(check) for check in checks]
    if options.json:
        print(json.dumps(found, indent=2))
    return int(any(check.passed is False for check in checks))


def bench(arguments: list[str]) -> int:
    """Run a benchmark."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: vi-simsiam bench {'|'.join(BENCHMARKS)} [OPTIONS]\n")
        print("\n".join(f"  {name:10}{about}" for name, (_, about) in BENCHMARKS.items()))
        return 0
    if name not in BENCHMARKS:
        raise none_of("bench", name or "nothing", BENCHMARKS)
    benchmark: Any = importlib.import_module(f"vi_simsiam.benchmarks.{BENCHMARKS[name][0]}")
    outcome = benchmark.run(parse(f"bench {name}", benchmark.Options, rest))
    return outcome if isinstance(outcome, int) else 0
