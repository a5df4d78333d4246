"""`vi-simsiam report`: all that is known of a run on one page."""

from __future__ import annotations

from vi_simsiam.cli.parsing import RunOptions, open_run, parse
from vi_simsiam.errors import InputError


def report(arguments: list[str]) -> int:
    """Write RUN/report.html and print its path; without the run's images where those or its weights are gone."""
    options = parse("report", RunOptions, arguments)

    from vi_simsiam.engine.run import read_config
    from vi_simsiam.evaluation.report import check_material, write_report

    config = read_config(options.run)
    check_material(options.run)
    opened, problem = None, None
    if config.method == "vi-simsiam":
        try:
            opened = open_run(options)
        except InputError as error:  # what was measured can be shown all the same
            problem = str(error)
            print(f"images left out: {problem}")
    print(write_report(options.run, opened, problem))
    return 0
