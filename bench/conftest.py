"""What makes the benchmarks run under pytest-benchmark: rows are collected, printed last, and kept in its JSON."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import AGAIN, DEVICE, QUICK, Case, Row, floors, rows_table, run_case, write_rows

ROWS: list[Row] = []


PATHS: list[Path] = []  # of our JSON, if it was asked for


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark looks
def pytest_configure(config: Any) -> None:
    """Take the path that pytest-benchmark was given: its file has thousands of lines, and neither peers nor floors."""
    option = config.option.benchmark_json  # a path, in older releases an open file
    if option:
        PATHS.append(Path(option if isinstance(option, str | Path) else option.name))
        config.option.benchmark_json = None


def save() -> None:
    for path in PATHS:
        write_rows(path, ROWS)


@pytest.fixture
def measure() -> Callable[[Any, Case], None]:
    """Measures a case with all its contenders, and hands its headline to pytest-benchmark as well."""

    def run(benchmark: Any, case: Case) -> None:
        rows, contenders = run_case(case)
        ROWS.extend(rows)
        save()  # after each case, so that a time limit leaves what there is
        (again,) = (c for c in contenders if c.name == case.headline + AGAIN)
        benchmark.group = case.operator

        def call() -> None:
            again.calls[0]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        with again.in_force():
            # Milliseconds in all: the figures that count are those of the rows, taken in turns with the peers.
            benchmark.pedantic(call, rounds=3 if QUICK else 5, iterations=2, warmup_rounds=1)
        print("\n" + rows_table(rows), flush=True)
        for contender in contenders:
            contender.calls = ()  # pytest-benchmark keeps the function, which would keep gigabytes
        torch._dynamo.reset()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()

    return run


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("rows: medians in microseconds")
    terminalreporter.write_line(f"floors: {floors()}")
    terminalreporter.write_line(rows_table(ROWS))
