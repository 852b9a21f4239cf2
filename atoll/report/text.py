"""Numbers, names and sentences of the report, as people say them. Plain text: nothing here is HTML."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from atoll.job.attack import POISONS_LABELS
from atoll.job.job import Job, OtherPartition
from atoll.report.audit import what_the_audit_found
from atoll.report.comparison import Comparison, finite, whole_percent
from atoll.report.run_result import PrivacyClaim, RunPrivacy, RunResult
from atoll.strategies import STRATEGIES
from atoll.tasks.metric_values import UNDEFINED, lower_is_better

NOT_MEASURED = "not measured"
FEW_CLASSES = 8
METRIC_SPELLINGS = {
    "f1": "F1",
    "auroc": "AUROC",
    "auc": "AUC",
    "mse": "MSE",
    "mae": "MAE",
    "rmse": "RMSE",
    "mase": "MASE",
    "ndcg": "NDCG",
    "c": "C",
    "map": "mAP",
    "map50": "mAP50",
    "iou": "IoU",
    "wer": "WER",
    "cer": "CER",
}
STRATEGY_NAMES = {
    "fedavg": "FedAvg", "fedavgm": "FedAvgM", "fedprox": "FedProx",
    "fedadagrad": "FedAdagrad", "fedadam": "FedAdam", "fedyogi": "FedYogi",
    "reptile": "Reptile", "diloco": "DiLoCo", "fednova": "FedNova", "fedexp": "FedExP",
    "scaffold": "SCAFFOLD", "feddyn": "FedDyn", "per-fedavg": "Per-FedAvg",
    "pfedme": "pFedMe", "moon": "MOON", "ifca": "IFCA", "signsgd": "signSGD",
    "fedbuff": "FedBuff", "fedasync": "FedAsync", "fedcompass": "FedCompass",
    "qffl": "q-FedAvg", "afl": "Agnostic federated learning",
    "krum": "Krum", "multi-krum": "Multi-Krum", "bulyan": "Bulyan",
}  # fmt: skip
ENGINES = {
    "inline": "in process (inline)",
    "loop": "in process, one client after the other (loop)",
    "ray": "Flower's engine on Ray",
}
SITES = "flower"
"""The engine of real sites: only of its runs may a report say that data never left them."""


def metric_label(name: str) -> str:
    """A metric's name as people write it.

    >>> metric_label("macro_f1")
    'macro F1'
    """
    return " ".join(METRIC_SPELLINGS.get(word, word) for word in name.split("_"))


def metric_value(name: str, value: object) -> str:
    """Accuracies in percent, all else with three decimals; a dash for what is undefined or wasn't measured.

    >>> metric_value("accuracy", 0.9258), metric_value("loss", None) == UNDEFINED
    ('92.6 %', True)
    """
    number = finite(value)
    if number is None:
        return UNDEFINED
    if "accuracy" in name:
        return f"{number * 100:.1f} %"
    return f"{number:.3f}" if abs(number) < 1000 else f"{number:.3g}"


def size(count: float) -> str:
    """Bytes in SI units.

    >>> size(1_540_000), size(77_000), size(12)
    ('1.54 MB', '77 kB', '12 bytes')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power * 0.9995:
            return f"{count / 1000**power:.3g} {unit}"
    return pluralize(round(count), "byte")


def duration(seconds: float | None) -> str:
    """A span of time with about three digits.

    >>> duration(0.0719), duration(4.196), duration(75), duration(3720)
    ('72 ms', '4.2 s', '1 min 15 s', '1 h 2 min')
    """
    if seconds is None:
        return NOT_MEASURED
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def pluralize(count: int, noun: str) -> str:
    """A count and its noun.

    >>> pluralize(1, "round"), pluralize(1925, "number"), pluralize(2, "class")
    ('1 round', '1,925 numbers', '2 classes')
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def join_words(names: Sequence[str]) -> str:
    """Names as a sentence has them.

    >>> join_words(["a", "b", "c"])
    'a, b and c'
    """
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, by linear interpolation.

    >>> quantile([0.0, 1.0, 4.0], 0.75)
    2.5
    """
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def what_was_tuned(result: RunResult, job: Job | None) -> str:
    """One sentence: the backbone, what of it was trained, and for which task."""
    backbone = result.backbone["name"]
    method = job.tune.method if job else None
    tuned = {
        "head": f"A new last layer, the head, was trained on top of {backbone}, which stayed frozen",
        "last-k": f"The last layers of {backbone} and a new head were trained",
        "lora": f"Low-rank adapters (LoRA) inside the frozen {backbone}{_head_beside(job)} were trained",
        "full": f"All weights of {backbone} and a new head were trained",
        "seeds": f"All weights of {backbone} and a new head were trained, along directions that a seed draws",
    }.get(method or "", f"A model on top of {backbone} was trained")
    return f"{tuned}, for {result.task.replace('-', ' ')}{_classes(result)}."


def _head_beside(job: Job | None) -> str:
    match job.tune.head if job else None:
        case "trained":
            return " and the head"
        case "frozen" | "lora" as tuned:
            return f", whose head was {'frozen too' if tuned == 'frozen' else 'adapted as well'},"
    return " and what is new of the head"


def _classes(result: RunResult) -> str:
    classes = [str(c) for c in result.facts.get("classes", [])]
    if not classes:
        return ""
    named = f": {join_words(classes)}" if len(classes) <= FEW_CLASSES else ""
    return f" into {pluralize(len(classes), 'class')}{named}"


def on_what_data(result: RunResult, job: Job | None) -> str:
    """One sentence: the data and how it lay with the clients."""
    clients = pluralize(result.population, "client")
    if job is None:
        return f"The data lay with {clients}."
    if result.engine == SITES:
        return f"{clients[0].upper()}{clients[1:]} trained on their own data, which never left their sites."
    source = job.data.source.rstrip("/").rsplit("/", 1)[-1]
    return f"The data, {source}, was dealt to {clients} {_dealt(job)}."


def _dealt(job: Job) -> str:
    partition = job.data.partition
    if isinstance(partition, OtherPartition):
        return f"by the partition {partition.kind}"
    match partition.kind:
        case "dirichlet":
            return f"with unequal shares of each class (Dirichlet, alpha {partition.alpha:g})"
        case "pathological":
            return f"so that each holds no more than {partition.classes_per_client} of the classes"
        case "natural":
            return f"by the column {partition.by}"
        case "resampled":
            skew = (
                f" in class shares of its own (Dirichlet, alpha {partition.alpha:g})"
                if partition.alpha
                else ""
            )
            return f"by drawing {partition.examples} for each{skew}: clients may share examples"
        case _:
            return "evenly, at random"


def how_it_went(result: RunResult) -> str:
    """One sentence: rounds, cohorts, and how updates merged."""
    sizes = sorted({len(line["cohort"]) for line in result.rounds})
    cohort = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else "0"
    rounds, all_clients = len(result.rounds), result.population
    clients = (
        "all clients" if sizes == [all_clients] else f"{cohort} of the {pluralize(all_clients, 'client')}"
    )
    when = "In one round" if rounds == 1 else f"In each of {rounds:,} rounds"
    if result.simulated_seconds:
        clients += " were asked; those who answered in time"
    return (
        f"{when}, {clients} trained and sent back how {_trainable(result)} had moved;"
        f" the server merged these updates by {describe_strategy(result.strategy)}."
    )


CHOSEN = {
    "uniform": "",
    "by-size": "Clients were drawn by chances in proportion to their examples.",
    "power-of-choice": "Of candidates drawn by size, those with the largest training losses took part.",
    "oort": "Clients with large training losses and short virtual times were chosen, and new ones (Oort).",
}
"""How a round's clients were chosen, by `federation.selection`."""


def how_chosen(job: Job | None) -> str:
    """A sentence on how clients were chosen, with a space before it; nothing where chances were even."""
    sentence = "" if job is None else CHOSEN[job.federation.selection]
    return f" {sentence}" if sentence else ""


def who_was_hostile(job: Job | None) -> str:
    """A sentence on the job's hostile clients, with a space before it; nothing where there are none."""
    if job is None or job.attack.kind is None:
        return ""
    count, kind = job.attack.clients, job.attack.kind
    sentence = (
        f" {count:,} of the clients {'was' if count == 1 else 'were'} hostile, as the job asks ({kind})"
    )
    if kind in POISONS_LABELS:
        sentence += ", and measured the model on the labels that they had changed"
    return sentence + "."


def describe_strategy(name: str) -> str:
    """A strategy's proper name and what it does."""
    known = STRATEGIES.get(name)
    return f"{STRATEGY_NAMES.get(name, name)}: {known.summary}" if known else name


def _trainable(result: RunResult) -> str:
    numbers = sum(prod(shape) for shape in result.trainable.values())
    return f"the {numbers:,} trained numbers" if numbers else "the trained numbers"


def what_it_cost(result: RunResult) -> str:
    """A sentence on traffic and time, and one on what compression saved."""
    sentence = (
        f"In all, {size(result.bytes_up)} travelled up to the server and {size(result.bytes_down)} down"
        f" to the clients, and the run took {duration(result.seconds)}."
    )
    compression = result.compression
    if compression is None:
        return sentence
    smaller = f"{compression['times_smaller']:.1f} times smaller"
    return f"{sentence} Updates were compressed by {compression['scheme']}: uploads were {smaller}."


def simulated_facts(result: RunResult) -> list[tuple[str, str]]:
    """What the devices' own clock says: (what, how much)."""
    rounds = [line["simulated"] for line in result.rounds]
    ordered = sorted(line["seconds"] for line in rounds)
    in_vain = {
        "not there": sum(line.get("unavailable", 0) for line in rounds),
        "too late": sum(line.get("late", 0) for line in rounds),
        "not needed": sum(line.get("surplus", 0) for line in rounds),
    }
    left_out = [f"{total:,} {word}" for word, total in in_vain.items() if total]
    return [
        ("simulated time of the run", duration(result.simulated_seconds)),
        ("of a round, median", duration(quantile(ordered, 0.5))),
        ("of the slowest round", duration(ordered[-1])),
        ("clients asked in vain", ", ".join(left_out) or "none"),
    ]


def simulated_rounds(result: RunResult) -> list[tuple[float, float]]:
    """(round, simulated seconds)."""
    return [(float(line["round"]), float(line["simulated"]["seconds"])) for line in result.rounds]


PLACES = {
    "client": "at each client",
    "server": "at the server",
    "distributed": "in shares by all clients of a round",
}


def what_was_private(privacy: RunPrivacy) -> str:
    """The privacy claim with all that it rests on, or that there is none."""
    if privacy["unit"] == "none":
        return "Privacy: this run made no privacy claim; no noise was added to what the clients sent."
    claims = " ".join(_claim(unit, of) for unit, of in privacy["units"].items())
    if privacy.get("audit"):
        claims += f" Audit: {what_the_audit_found(privacy['audit'])}"
    if privacy["seeded_noise"]:
        return (
            "Privacy: none, for the noise was seeded, as a simulation may, and anybody can repeat it. Had it"
            f" been real: {claims}"
        )
    return f"Privacy: {claims}"


def _claim(unit: str, of: PrivacyClaim) -> str:
    """One unit's epsilon; what an older result doesn't hold is called not recorded."""
    epsilon, loose, delta = (finite(of.get(key)) for key in ("epsilon", "epsilon_rdp", "delta"))
    spent = "no finite epsilon" if epsilon is None else f"epsilon {epsilon:.3g}"
    at = "" if delta is None else f" at delta {delta:.2g}"
    if of.get("teacher"):
        without_teacher = _short(of["without_teacher"].get("epsilon"))
        at += (
            f" (its own {without_teacher} and the teacher's {_short(of['teacher'].get('epsilon'))}, added up)"
        )
    beside = "" if loose is None else f" ({loose:.3g} by RDP)"
    noise, releases = finite(of.get("noise_multiplier")), finite(of.get("releases"))
    much = "unknown noise" if noise is None else f"noise multiplier {noise:.4g}"
    often = "" if releases is None else f" in {releases:,.0f} releases"
    relation = str(of.get("relation") or "neighbours not recorded").replace("-", " ")
    return (
        f"for one {unit} ({relation}), {spent}{at} by"
        f" {of.get('accountant') or 'an unknown accountant'}{beside}, with {much}{often}, added"
        f" {PLACES.get(of.get('where') or '', 'at a place not recorded')};"
        f" sampling: {of.get('sampler') or 'not recorded'}."
    )


def _short(value: Any) -> str:
    """An epsilon in three digits."""
    return "unknown" if finite(value) is None else f"{value:.3g}"


NOT_MEASURED = (
    "Nothing was measured: the server has no test set (data.test_fraction, data.test), and clients tell no"
    " measurement of their own (data.validation_fraction)."
)


def comparison_sentence(compared: Comparison) -> str:
    """The comparison table in one sentence."""
    metric = compared.headline
    federated = compared.value("federated", metric) if metric else None
    if metric is None or federated is None:
        if metric is not None and metric in compared.rows.get("federated", {}):
            return f"The federated model's {metric_label(metric)} is undefined on these examples."
        return NOT_MEASURED if not compared.rows else "The federated model was not measured."
    values = {row: metric_value(metric, compared.value(row, metric)) for row in compared.rows}
    word, share = metric_label(metric), compared.gap_closed
    if share is not None:
        return _gap_sentence(share, word, values)
    rows = compared.rows if compared.on_test_set else {}
    if "local_only" in rows and "pooled" in rows:
        return (
            f"Clients alone ({values['local_only']}) and pooled data ({values['pooled']}) leave no gap"
            f" in {word} that federation could close; it reached {values['federated']}."
        )
    if "local_only" in rows:
        return (
            f"Federation reached {values['federated']} {word};"
            f" a client alone reaches {values['local_only']} on average."
        )
    if "pooled" in rows:
        return f"Federation reached {values['federated']} {word}, pooled data {values['pooled']}."
    if "zero_shot" in rows:
        return f"Training took {word} from {values['zero_shot']} to {values['federated']}."
    return f"Federation reached {values['federated']} {word}; there is no baseline to compare it with."


def _gap_sentence(share: float, word: str, values: dict[str, str]) -> str:
    if share < 0:
        return (
            f"Federation did worse than clients alone: {values['federated']} {word}"
            f" against {values['local_only']} on average."
        )
    if share >= 1:
        return (
            f"Federation did as well as pooled data or better: {values['federated']} {word}"
            f" against {values['pooled']} with all data in one place"
            f" and {values['local_only']} for a client alone."
        )
    return (
        f"Federation closed {whole_percent(share)} of the gap in {word} between clients alone"
        f" ({values['local_only']}) and pooled data ({values['pooled']})."
    )


def better(metric: str) -> str:
    """Which way a metric improves."""
    return "lower is better" if lower_is_better(metric) else "higher is better"
