"""Sites that are machines of their own, in network namespaces: what befalls their links costs no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import client_names
from atoll.sim.population.write_shards import write_shards
from tests.federation.namespaces import SERVER, Network, missing, network_of
from tests.federation.places import Federation, provisioned, result_of, unused_port
from tests.support.processes import wait_until

pytestmark = [pytest.mark.federation, pytest.mark.timeout(900)]
LACKING = missing()
if LACKING:
    pytest.skip(LACKING, allow_module_level=True)


def job(name: str, sites: int) -> Job:
    """A whole network of 250 kB travels, so that a narrow line is felt."""
    return Job.parse(
        {
            "name": name,
            "seed": 5,
            "task": {"name": "image-classification"},
            "data": {"source": "digits", "partition": {"kind": "iid"}},
            "backbone": {"name": "atoll:lenet", "weights": "random"},
            "tune": {"method": "full"},
            "train": {"lr": 0.05, "batch_size": 16, "optimizer": "sgd"},
            "federation": {"clients": sites, "rounds": 3, "wait": 600, "round_timeout": 600},
        },
        origin="test",
    )


@dataclass
class Apart:
    """A federation whose places are namespaces, with a client's data at each site."""

    federation: Federation
    network: Network
    setting: Job

    @classmethod
    @contextmanager
    def of(cls, folder: Path, count: int) -> Iterator[Apart]:
        names = tuple(client_names(count))
        setting = job("apart", count)
        write_shards(setting, folder / "shards")
        with network_of(*names) as network:
            kits = provisioned(folder, names, unused_port(), host=SERVER)
            federation = Federation(folder, kits, serving=network.options("server"))
            try:
                federation.serve()
                for name in names:
                    federation.join(name, folder / "shards" / name, **network.options(name))
                federation.wait_online(*names)
                yield cls(federation, network, setting)
            finally:
                federation.close()

    @contextmanager
    def submitted(self, out: Path, site: str, round: int) -> Iterator[None]:
        """Submit; the block is entered once the site trains in that round, and the run has to end well."""
        asked = f"round {round} of {self.setting.name}: train {site}"
        training = self.federation.running[site]
        before = training.text().count(asked)
        run = self.federation.submit(self.setting, out, **self.network.options("server"))
        wait_until(
            lambda: training.text().count(asked) > before, asked, alive=lambda: run.process.poll() is None
        )
        yield
        assert run.ends() == 0, run.text()

    @contextmanager
    def silence_of(self, *sites: str) -> Iterator[None]:
        """The block is left once the server has said that these sites are silent."""
        server = self.federation.running["server"]
        before = {words: server.text().count(words) for words in (f"{site} is silent" for site in sites)}
        yield
        for words, times in before.items():
            server.says(words, times + 1)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    with Apart.of(tmp_path_factory.mktemp("apart"), 3) as apart:
        yield apart


@pytest.fixture(scope="module")
def undisturbed(apart: Apart) -> str:
    """The bits of the simulation."""
    out = apart.federation.folder / "simulated"
    return simulate(apart.setting, out, on_event=ignore_events, report=False).model_sha256


def test_loss_a_narrow_line_and_a_cut_one_cost_time_alone(
    apart: Apart, undisturbed: str, tmp_path: Path
) -> None:
    """At once: 20 % of packets lost (row 13), 1 Mbit/s (row 15), a link down until it is noticed (row 10)."""
    lossy, narrow, cut = apart.network.sites
    apart.network.lose(lossy, 20)
    apart.network.narrow(narrow, "1mbit")
    with apart.submitted(tmp_path / "run", cut, 1):
        with apart.silence_of(cut):
            apart.network.cut(cut)
        apart.network.mend(cut)
    result = result_of(tmp_path / "run")
    assert result["model_sha256"] == undisturbed
    assert [line["set_aside"] for line in result["rounds"]] == [{}, {}, {}]
    apart.network.mend(lossy)


FAULTS: dict[str, Callable[[Network, str], None]] = {
    "nothing gets to the site": lambda network, site: network.silence(site, "input"),  # row 11
    "nothing gets from the site": lambda network, site: network.silence(site, "output"),
    "all connections reset": lambda network, site: network.reset(site),  # row 12
    "the link is down": lambda network, site: network.cut(site),
}


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_befalls_a_link_the_run_ends_in_the_same_bits(
    apart: Apart, undisturbed: str, tmp_path: Path, fault: str
) -> None:
    site = apart.network.sites[0]
    with apart.submitted(tmp_path / "run", site, 2):
        with apart.silence_of(site):
            FAULTS[fault](apart.network, site)
        apart.network.mend(site)
    assert result_of(tmp_path / "run")["model_sha256"] == undisturbed


@pytest.mark.matrix
def test_eight_sites_in_nine_namespaces(tmp_path: Path) -> None:
    """One link loses packets, one is narrow, two are cut for a time, and a site is killed and comes back."""
    with Apart.of(tmp_path / "eight", 8) as apart:
        expected = simulate(apart.setting, tmp_path / "simulated", on_event=ignore_events, report=False)
        sites, network = apart.network.sites, apart.network
        network.lose(sites[0], 20)
        network.narrow(sites[1], "1mbit")
        with apart.submitted(tmp_path / "run", sites[2], 1):
            with apart.silence_of(*sites[2:4]):
                network.cut(sites[2]), network.silence(sites[3], "output")
                apart.federation.running[sites[4]].kill()
            network.mend(sites[2]), network.mend(sites[3])
            shard = tmp_path / "eight" / "shards" / sites[4]
            apart.federation.join(sites[4], shard, **network.options(sites[4]))
        assert result_of(tmp_path / "run")["model_sha256"] == expected.model_sha256
