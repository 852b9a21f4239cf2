"""A Flower executor that forks each run's ServerApp from a fork server with all modules imported.

Flower itself starts a new Python process for every run, which imports torch and other packages again. The
use of Flower 1.41's non-public API is confined to this file: `run_superexec` calls `get_executor` for the
object that starts a task's process.
"""

from __future__ import annotations

import multiprocessing
import os
from importlib import import_module
from typing import Any

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

from atoll.system.fork_server import start_program

SERVER_APP = "atoll.server.deploy.executor:server_app"


class ForkingExecutor:
    """Forks a process for each run's ServerApp, with the same interface as Flower's own executors."""

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: Any
    ) -> tuple[set[TaskType], set[str]]:
        """ServerApp tasks are eligible at any time, all others never."""
        return supported_task_types & {TaskType.SERVER_APP}, set()

    def wait_for_capacity(self, task_type: TaskType | None = None, **_: Any) -> None:
        """Return at once: there is no limit on running tasks."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process in this process's group, so that both are stopped together."""
        arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token]
        arguments += ["--insecure"] if spec.insecure else []
        if spec.root_certificates_path is not None:
            arguments += ["--root-certificates", spec.root_certificates_path]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            start_program(
                SERVER_APP, tuple(arguments), environment=os.environ, output=nowhere, errors=nowhere,
                title=f"flwr-serverapp {spec.runtime_api_address}", group=os.getpgid(0),
            )  # fmt: skip
        finally:
            os.close(nowhere)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Reap the child processes that have ended."""
        multiprocessing.active_children()

    def close(self) -> None:
        """Do nothing: running tasks are in this process's group and are stopped with it."""


def superexec() -> None:
    """Run Flower's SuperExec with processes from the fork server; the entry point of a child process."""
    vars(run_superexec)["get_executor"] = lambda *_, **__: ForkingExecutor()
    flower_superexec()


def server_app() -> None:
    """Run Flower's program for one run with the installed ServerApp, ignoring the code in the run's bundle.

    Otherwise anyone who can start a run could supply code that reads the server's keys.
    """
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    from atoll.server.app import app

    program = vars(import_module("flwr.superlink.runtime.run_serverapp"))
    run = program["run_"]

    def run_installed(grid: Any, context: Any, server_app_dir: str, **_: Any) -> Any:
        return run(grid, context, server_app_dir, loaded_server_app=app)

    program["run_"] = run_installed
    flwr_serverapp()
