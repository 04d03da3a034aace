"""What makes the benchmarks run under pytest-benchmark: rows are collected, printed last, and kept in its JSON."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import AGAIN, DEVICE, QUICK, Case, Row, environment, floors, rows_table, run_case, write_json

ROWS: list[Row] = []
ENVIRONMENT = environment()


def save(config: Any) -> None:
    """Write our JSON to the path that pytest-benchmark was given for its own."""
    option = config.option.benchmark_json  # a path, in older releases an open file
    if option:
        rows = [dataclasses.asdict(row) for row in ROWS]
        path = Path(option if isinstance(option, str | Path) else option.name)
        write_json(path, {"environment": ENVIRONMENT, "floors": floors(), "rows": rows})


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[Any, Case], None]:
    """Measures a case with all its contenders, and hands its headline to pytest-benchmark as well."""

    def run(benchmark: Any, case: Case) -> None:
        rows, contenders = run_case(case)
        ROWS.extend(rows)
        save(request.config)  # after each case, so that a time limit leaves what there is
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


@pytest.hookimpl(trylast=True)  # pytest-benchmark writes its file in this hook
def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("rows: medians in microseconds")
    terminalreporter.write_line(f"floors: {floors()}")
    terminalreporter.write_line(rows_table(ROWS))
    save(config)  # again: pytest-benchmark's own file has thousands of lines, and neither peers nor floors
