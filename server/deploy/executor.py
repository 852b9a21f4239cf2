"""Flower's executor of runs, with a warm parent: each run's ServerApp is forked from the fork server.

Flower starts a new Python for every run, which imports torch and its like anew. All of this that isn't
public in Flower 1.41 is here: `run_superexec` asks `get_executor` for what starts a task's process.
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
    """Forks a process for each run's ServerApp; the task is not told from Flower's own executors."""

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: Any
    ) -> tuple[set[TaskType], set[str]]:
        """ServerApps alone, whenever they come."""
        return supported_task_types & {TaskType.SERVER_APP}, set()

    def wait_for_capacity(self, task_type: TaskType | None = None, **_: Any) -> None:
        """There is always room."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process; it is in this one's group, so that both are stopped together."""
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
        """Forget the processes that have ended."""
        multiprocessing.active_children()

    def close(self) -> None:
        """What runs is in this process's group and is stopped with it."""


def superexec() -> None:
    """Flower's SuperExec with processes from the fork server; the entry of a child process."""
    vars(run_superexec)["get_executor"] = lambda *_, **__: ForkingExecutor()
    flower_superexec()


def server_app() -> None:
    """Flower's program for a run, with the installed ServerApp whatever the run's bundle holds.

    Whoever can start a run could otherwise bring code that reads the server's keys.
    """
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    from atoll.server.app import app

    program = vars(import_module("flwr.superlink.runtime.run_serverapp"))
    run = program["run_"]

    def run_installed(grid: Any, context: Any, server_app_dir: str, **_: Any) -> Any:
        return run(grid, context, server_app_dir, loaded_server_app=app)

    program["run_"] = run_installed
    flwr_serverapp()
