"""One small iteration of each benchmark, so that it cannot rot. What it measures here means nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.servers import postgres  # noqa: F401 - makes the service known
from tests.servers.services import require


@pytest.mark.service
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("postgres --only w1,w2,floor", "w1_share_of_floor w2_vs_commit floor_rows_per_s"),
        ("postgres --only counts,processes,signal", "w2_durable_per_step w1_2_processes_workflows_per_s signal_p50_ms"),
        ("kill", "durable_one_of_two_s durable_restarted_twice"),
        (
            "remote --transport lane --transport emitter",
            "lane_p50_ms lane_p95_ms lane_workflows_per_s lane_share_of_raw emitter_p50_ms emitter_workflows_per_s",
        ),
        (
            "service",
            "events_per_s events_bulk_per_s events_share_of_floor connect_steps_per_s serve_steps_per_s"
            " connect_event_to_first_step_p95_ms",
        ),
        ("service --store sqlite --only events,starts", "events_per_s inside_event_to_first_step_p95_ms"),
        ("scale", "step_cost_at_1m_vs_empty idle_statements_per_s timer_lateness_p95_s"),
    ],
)
def test_a_glance_at_each_benchmark_on_postgres(name: str, figures: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each runs to its end without peers, and its last line is one JSON object with the figures it promises."""
    require("postgres")
    module, *args = name.split()
    if module == "remote":
        require("redis")
    skip = [] if module in ("scale", "remote", "service") else ["--skip-peers"]
    importlib.import_module(f"tests.bench.{module}").main(["--quick", *skip, *args])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures.split()) <= set(last)
    assert last["machine"]["fsync"] == "on"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["engine --workflows 500 --runs 1", "store --batch 20 --rounds 5"])
def test_a_glance_at_each_benchmark_without_a_server(command: str) -> None:
    """Each runs to its end."""
    name, *args = command.split()
    subprocess.run([sys.executable, "-m", f"tests.bench.{name}", *args], cwd=ROOT, check=True, capture_output=True)
