"""The report: one file that a person can read, whatever the run was like."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from atoll.cli.display import comparison
from atoll.job.job import Job
from atoll.report.comparison import comparison_of
from atoll.report.page import page, report_of, write_report
from atoll.report.run_result import RunResult
from atoll.report.templates import ENVIRONMENT, fill_in
from atoll.report.text import NOT_MEASURED, comparison_sentence
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks.metric_values import UNDEFINED
from tests.support.chromium import Chromium, browser
from tests.support.results import result_with

SECTIONS = (
    "Comparison", "Round by round", "Clients", "Updates set aside", "Traffic, time and memory",
    "Reproduce this run",
)  # fmt: skip
JOB = {
    "name": "tiny-digits",
    "seed": 5,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "backbone": {"name": "torchvision:mobilenet_v2", "weights": "random", "image_size": 32},
    "federation": {"clients": 5, "cohort": 3, "rounds": 3},
    "evaluate": {"baselines": ["zero_shot", "local_only", "pooled"]},
}
HOSTILE = "<script>alert(1)</script>\n\"&'"
VOID = {"meta", "br", "img", "link", "hr", "input"}

Result = dict[str, Any]
"""A result as JSON, which tests change before a page is made of it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A real run: its directory and its result."""
    out = tmp_path_factory.mktemp("run") / "digits"
    result = simulate(Job.parse(JOB, origin="test"), out, on_event=ignore_events)
    return out, result.to_json()


@pytest.fixture
def result(run: tuple[Path, Result]) -> Result:
    return copy.deepcopy(run[1])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = browser()
    if path is None:
        pytest.skip("no chromium on this machine")
    with Chromium(path, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


Change = Callable[[Result], None]


@pytest.fixture(scope="module")
def reported(run: tuple[Path, Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Change], Path]:
    """The folder with the report of a changed result, which is written once for all tests that look at it."""

    @cache
    def reported(change: Change) -> Path:
        result, folder = copy.deepcopy(run[1]), tmp_path_factory.mktemp("report")
        change(result)
        write_report(folder, RunResult(**result))
        return folder

    return reported


def no_baselines(result: Result) -> None:
    result["baselines"] = {}


def no_server_metrics(result: Result) -> None:
    result["baselines"], result["final"]["server"] = {}, {}


def one_round(result: Result) -> None:
    result["rounds"] = result["rounds"][:1]


def every_second_round(result: Result) -> None:
    for line in result["rounds"][::2]:
        line["metrics"] = {}


def nothing_measured(result: Result) -> None:
    no_server_metrics(result)
    result["final"]["clients"] = {name: {"examples": 0} for name in result["final"]["clients"]}
    for line in result["rounds"]:
        line |= {"metrics": {}, "loss": None}


def no_clients_and_no_rounds(result: Result) -> None:
    nothing_measured(result)
    result["final"]["clients"], result["rounds"] = {}, []


def not_numbers(result: Result) -> None:
    result["final"]["server"]["macro_f1"] = float("nan")
    result["baselines"]["pooled"]["accuracy"] = None
    result["rounds"][0]["loss"] = float("nan")
    next(iter(result["final"]["clients"].values()))["accuracy"] = float("nan")


def five_hundred_clients(result: Result) -> None:
    result["final"]["clients"] = {
        f"client-{i:04d}": {"accuracy": i / 500, "macro_f1": i / 500, "loss": 1.0, "examples": 1 + i}
        for i in range(498)
    } | {"client-0498": {"examples": 0}, "client-0499": {"examples": 0}}


def hostile(result: Result) -> None:
    clients = result["final"]["clients"]
    result["name"] = HOSTILE
    clients[HOSTILE] = clients.pop("client-0000")
    clients["unbroken" * 60] = clients.pop("client-0001")
    result["facts"]["classes"] = [HOSTILE, "b"]
    result["notes"] = [HOSTILE]
    result["backbone"] = {"name": HOSTILE, "origin": HOSTILE}
    result["strategy"] = result["task"] = result["engine"] = HOSTILE
    result["machine"]["versions"][HOSTILE] = HOSTILE
    result["rounds"][0]["set_aside"] = {HOSTILE: HOSTILE}
    for line in result["rounds"]:
        line["metrics"][HOSTILE] = 0.5
    result["final"]["server"][HOSTILE] = 0.5
    result["baselines"][HOSTILE] = {HOSTILE: 0.5}


def many_set_aside(result: Result) -> None:
    reason = f"not finite: {'head' * 30}"
    result["rounds"][0]["set_aside"] = {f"client-{i:04d}": reason for i in range(400)}


def private(result: Result) -> None:
    claim = {"unit": "client", "epsilon": 2.351, "delta": 1e-5, "seeded_noise": True}
    result["privacy"] |= claim | {"units": {"client": claim}}


CASES: list[Callable[[Result], None]] = [
    no_baselines, no_server_metrics, one_round, every_second_round, nothing_measured,
    no_clients_and_no_rounds, not_numbers, five_hundred_clients, hostile, many_set_aside,
    private,
]  # fmt: skip


class Outline(HTMLParser):
    """Checks that tags balance, and keeps the text, the headings and what tags refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pieces, self.headings, self.refers, self.ids = [], [], [], []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"a handler: {name}"
            if name in ("src", "href", "action", "data", "srcset", "poster", "xlink:href"):
                self.refers.append(value or "")
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def outline(html: str) -> Outline:
    """The page's outline; what holds of every page is checked on the way."""
    found = Outline(html)
    assert tuple(found.headings) == SECTIONS
    assert all(ref.startswith(("#", "data:")) for ref in found.refers)
    assert not re.search(r"(url\(|@import)[^)]*//", html)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(
        r"\b(nan|inf|None|null|mathdefault)\b", " ".join(found.pieces).replace("None: every", "")
    )
    return found


def test_a_real_run_leaves_its_report(run: tuple[Path, Result]) -> None:
    folder, result = run
    found = outline((folder / "report.html").read_text("utf-8"))
    for said in (
        "tiny-digits", "5 clients", "In each of 3 rounds, 3 of the 5 clients trained", "FedAvg", "macro F1",
        "this run made no privacy claim", "None: every update", result["model_sha256"], result["job_hash"],
        "atoll simulate job.toml --engine inline", 'source = "digits"', "untrained head", "torch",
    ):  # fmt: skip
        assert said in found.text, said


def test_the_same_result_gives_the_same_bytes(run: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = run
    before = (folder / "report.html").read_bytes()
    write_report(folder, RunResult.read(folder))
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".report*"))


def test_threads_do_not_disturb_each_other(run: tuple[Path, Result]) -> None:
    import matplotlib

    folder, result = run
    before, settings, pages = page(folder, RunResult(**result)), dict(matplotlib.rcParams), []
    threads = [
        threading.Thread(target=lambda: pages.append(page(folder, RunResult(**result)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pages == [before] * 4
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_every_kind_of_run_has_a_sound_page(reported: Callable[[Change], Path], change: Change) -> None:
    outline((reported(change) / "report.html").read_text("utf-8"))


def test_names_from_outside_stay_text(result: Result, tmp_path: Path) -> None:
    hostile(result)
    (tmp_path / "job.toml").write_text(f"name = '{HOSTILE}'")
    html = page(tmp_path, RunResult(**result))
    assert "<script" not in html
    text = outline(html).text
    assert text.startswith("<script>alert(1)</script>␊\"&': Atoll run report", text.index("<script>"))
    assert re.search(r"the worst, (client-\d{4}|unbroken\w*|<script>alert\(1\)</script>␊\"&'), sees", text)
    assert "name = '<script>alert(1)</script>\n" in text
    assert text.count("<script>alert(1)</script>␊") >= 15


def test_a_template_escapes_text_and_writes_plots_as_they_are() -> None:
    template = ENVIRONMENT.from_string("{{ name }} {{ plot }} {{ share }}")
    filled = template.render(name="<b>\x07", plot=Markup("<svg/>\n"), share="92.6 %")
    assert filled == "&lt;b&gt;␇ <svg/>\n 92.6\N{NO-BREAK SPACE}%"


def test_a_name_that_the_template_was_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'report' is undefined"):
        fill_in("report.html.j2")


def test_what_the_template_is_given_is_text_but_for_the_plots(run: tuple[Path, Result]) -> None:
    report = report_of(run[0], RunResult(**run[1]))
    plots = [*report.rounds.plots, *report.cost.plots, *(report.clients.plots if report.clients else ())]
    assert plots and all(isinstance(plot, Markup) and plot.startswith("<svg ") for plot in plots)
    assert str(report).count("Markup(") == len(plots)


def test_many_clients_show_both_ends_and_say_so(result: Result, tmp_path: Path) -> None:
    five_hundred_clients(result)
    text = outline(page(tmp_path, RunResult(**result))).text
    # 498 measured: 100 worst and 20 best are shown, 378 are not.
    assert "378 clients in between and 2 clients without validation examples left out" in text
    shown = re.findall(r"client-\d{4}", text.split("Client by client")[1])
    assert shown == [f"client-{i:04d}" for i in [*range(100), *range(478, 498)]]


def test_a_client_without_validation_examples_is_shown_as_such(result: Result, tmp_path: Path) -> None:
    result["final"]["clients"]["client-0002"] = {"examples": 0}
    text = outline(page(tmp_path, RunResult(**result))).text
    assert "client-00020no validation examples" in text
    assert "1 client had no validation examples." in text


def test_updates_set_aside_are_listed_with_their_reason(result: Result, tmp_path: Path) -> None:
    result["rounds"][1]["set_aside"] = {"client-0003": "head.bias is not finite"}
    text = outline(page(tmp_path, RunResult(**result))).text
    assert "1 update in 1 round did not enter the model." in text
    assert "2client-0003head.bias is not finite" in text


def test_a_missing_number_is_a_dash(result: Result, tmp_path: Path) -> None:
    not_numbers(result)
    assert outline(page(tmp_path, RunResult(**result))).text.count(UNDEFINED) >= 3


def test_seeded_noise_is_not_sold_as_privacy(result: Result, tmp_path: Path) -> None:
    private(result)
    text = outline(page(tmp_path, RunResult(**result))).text
    assert "for one client (neighbours not recorded), epsilon 2.35 at delta 1e-05" in text
    assert "Privacy: none, for the noise was seeded" in text


@pytest.mark.parametrize(
    ("alone", "federated", "pooled", "said"),
    [
        (0.4, 0.8, 0.9, "closed 80 % of the gap in accuracy"),  # (0.8 - 0.4) / (0.9 - 0.4) = 0.8
        (0.4, 0.8999, 0.9, "closed 99 % of the gap"),  # rounded down: only all is 100 %
        (0.4, 0.95, 0.9, "as well as pooled data or better: 95.0 % accuracy against 90.0 %"),
        (0.4, 0.3, 0.9, "did worse than clients alone: 30.0 % accuracy against 40.0 %"),
        (0.9, 0.9, 0.9, "leave no gap"),
        (0.9, 0.8, 0.5, "leave no gap"),
        (None, 0.8, 0.9, "reached 80.0 % accuracy, pooled data 90.0 %"),
        (0.4, 0.8, None, "a client alone reaches 40.0 %"),
        (None, 0.8, None, "there is no baseline"),
        (0.4, None, 0.9, "accuracy is undefined on these examples"),
    ],
)
def test_the_sentence_reads_the_table(alone: Any, federated: Any, pooled: Any, said: str) -> None:
    baselines = {"local_only": alone, "pooled": pooled}
    result = result_with(
        baselines={name: {"accuracy": v} for name, v in baselines.items() if v is not None},
        final={"server": {"accuracy": federated}, "clients": {}},
    )
    assert said in comparison_sentence(comparison_of(result))


def test_that_nothing_was_measured_is_a_sentence(result: Result, tmp_path: Path) -> None:
    result["baselines"], result["final"] = {}, {"server": {}, "clients": {}}
    assert comparison(RunResult(**result)) == NOT_MEASURED
    text = outline(page(tmp_path, RunResult(**result))).text
    assert "Nothing was measured: the server has no test set" in text
    assert "Federated learning beside its baselines" not in text


def test_without_a_server_test_set_clients_count_by_their_examples() -> None:
    clients = {
        "a": {"accuracy": 1.0, "examples": 1},
        "b": {"accuracy": 0.5, "examples": 3},
        "c": {"examples": 0},
    }
    compared = comparison_of(result_with(final={"server": {}, "clients": clients}))
    # (1 * 1.0 + 3 * 0.5) / 4 = 0.625
    assert compared.value("federated", "accuracy") == 0.625
    assert not compared.on_test_set


def test_a_mean_over_clients_says_over_which_it_is() -> None:
    clients = {
        "a": {"auroc": 1.0, "examples": 1},
        "b": {"auroc": None, "examples": 3},
        "c": {"examples": 0},
    }
    compared = comparison_of(result_with(final={"server": {}, "clients": clients}))
    assert compared.value("federated", "auroc") == 1.0
    assert compared.remarks == ["federated auroc: mean over 1 of 2 clients"]


def test_an_undefined_metric_is_a_dash_and_no_point(result: Result, tmp_path: Path) -> None:
    name, client = next(iter(result["final"]["clients"].items()))
    client["accuracy"] = result["rounds"][0]["metrics"]["accuracy"] = None
    text = outline(page(tmp_path, RunResult(**result))).text
    assert "At 1 client it is undefined." in text
    assert f"{name}{client['examples']}{UNDEFINED}" in text


def test_a_loss_closes_its_gap_downwards() -> None:
    baselines = {"local_only": {"loss": 1.0}, "pooled": {"loss": 0.2}}
    result = result_with(baselines=baselines, final={"server": {"loss": 0.4}, "clients": {}})
    # (1.0 - 0.4) / (1.0 - 0.2) = 0.75
    assert comparison_of(result).gap_closed == pytest.approx(0.75)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("change", [lambda result: None, *CASES], ids=lambda change: change.__name__)
def test_a_browser_shows_all_of_it(
    chromium: Chromium, reported: Callable[[Change], Path], change: Change, width: int
) -> None:
    path = reported(change) / "report.html"
    chromium.open(path, width=width)
    text = chromium.value("document.body.innerText")
    assert all(heading in text for heading in SECTIONS)
    assert chromium.value("document.documentElement.scrollWidth") <= width
    assert chromium.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    drawn = "s => s.getBBox().width > 100 && s.querySelector('path')"
    assert chromium.value(f"[...document.querySelectorAll('figure svg')].every({drawn})")
    assert chromium.value("document.scripts.length") == 0
    loud = (
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    )
    assert not [e for e in chromium.events if e.get("method") in loud]
    asked = [
        e["params"]["request"]["url"]
        for e in chromium.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("dark", [False, True])
def test_letters_stand_out_in_light_and_dark(
    chromium: Chromium, run: tuple[Path, Result], dark: bool
) -> None:
    chromium.open(run[0] / "report.html", width=1280, dark=dark)
    colours = {
        name: chromium.value(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        for name in ("paper", "card", "ink", "muted", "federated", "local_only", "pooled", "training")
    }
    assert luminance(colours["paper"]) < 0.1 if dark else luminance(colours["paper"]) > 0.9
    for name in ("ink", "muted", "federated", "local_only", "pooled", "training"):
        for ground in ("paper", "card"):
            # WCAG AA for text.
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG defines it."""
    parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("engine", ["inline", "loop", "ray", "flower"])
def test_only_a_run_of_real_sites_says_that_data_never_left_them(
    run: tuple[Path, Result], result: Result, tmp_path: Path, engine: str
) -> None:
    (tmp_path / "job.toml").write_bytes((run[0] / "job.toml").read_bytes())
    text = outline(page(tmp_path, RunResult(**result | {"engine": engine}))).text
    assert ("never left their sites" in text) == (engine == "flower")
    assert ("was dealt to" in text) == (engine != "flower")
