"""Medical images: scans as they are read, patients kept together, and the metrics of screening."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from atoll.data.images import decode_image
from atoll.datasets.synthetic.png import grey_png
from atoll.errors import DataError
from atoll.job.job import DataSection, Job
from atoll.learning.learner import Learner, sum_states
from atoll.server.run.personalization_metrics import (
    personalization_metrics,
    personalization_notes,
    with_adapted,
)
from atoll.tasks import task_named
from atoll.tasks.medical.dicom import as_picture
from atoll.tasks.medical.task import MEDICAL_IMAGING

DATA = DataSection(source="./here")
FACTS = {"classes": ["no", "yes"]}


def dicom(stored: np.ndarray, kind: str = "MONOCHROME2", **header: object) -> bytes:
    """A DICOM file of 12-bit values, unsigned."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    made = FileDataset("made", {}, file_meta=meta, preamble=bytes(128))
    made.Rows, made.Columns = stored.shape
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, kind, 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.PixelData = stored.astype("<u2").tobytes()
    for name, value in header.items():
        setattr(made, name, value)
    out = BytesIO()
    pydicom.dcmwrite(out, made, enforce_file_format=True)
    return out.getvalue()


def grey(data: bytes) -> list[list[int]]:
    return np.asarray(decode_image(as_picture(data, "x"), "x"))[:, :, 0].tolist()


STORED = np.array([[0, 2048, 4095]])


def test_without_a_window_the_bits_range_is_black_to_white() -> None:
    # 2048 / 4095 * 255 = 127.53
    assert grey(dicom(STORED)) == [[0, 128, 255]]


def test_monochrome1_is_turned() -> None:
    assert grey(dicom(STORED, "MONOCHROME1")) == [[255, 127, 0]]


def test_values_are_rescaled_and_go_through_the_window() -> None:
    # Stored 0, 2048, 4095 are -1024, 1024, 3071; black at 1024.5 - 0.5 - 2047 / 2 = 0.5, white at 2047.5:
    # (1024 - 0.5) / 2047 * 255 = 127.5, to the even 128.
    data = dicom(STORED, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=1024.5, WindowWidth=2048)
    assert grey(data) == [[0, 128, 255]]


def test_dicom_that_is_cut_short_is_one_line() -> None:
    with pytest.raises(DataError, match=r"scan\.dcm: DICOM that cannot be decoded") as told:
        as_picture(dicom(np.zeros((8, 8)))[:-40], "scan.dcm")
    assert "\n" not in str(told.value)


def scans(root: Path, patients: int = 8, each: int = 3) -> Path:
    """Bright where there is a finding; half as DICOM, half as PNG."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["image,label,patient_id"]
    for patient in range(patients):
        for number in range(each):
            pixels = rng.integers(0, 120, (8, 8)) + 100 * (patient % 2)
            name = f"{patient}-{number}." + ("dcm" if number else "png")
            data = dicom(pixels * 16) if number else grey_png(pixels.astype(np.uint8))
            (root / name).write_bytes(data)
            lines.append(f"{name},{'yes' if patient % 2 else 'no'},p{patient}")
    (root / "scans.csv").write_text("\n".join(lines))
    return root


def test_what_is_written_is_read_back_with_the_same_keys(tmp_path: Path) -> None:
    table = MEDICAL_IMAGING.read(scans(tmp_path / "d"), DATA, {})
    MEDICAL_IMAGING.write(table.train, tmp_path / "out", DATA)
    again = MEDICAL_IMAGING.read(tmp_path / "out", DATA, {})
    assert MEDICAL_IMAGING.keys(again.train) == MEDICAL_IMAGING.keys(table.train)


def test_a_folder_per_class_has_no_patients(tmp_path: Path) -> None:
    for name in ("no", "yes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.dcm").write_bytes(dicom(STORED))
    table = MEDICAL_IMAGING.read(tmp_path, DATA, {})
    assert sorted(table.train["label"]) == ["no", "yes"]
    assert MEDICAL_IMAGING.groups(table.train) is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [("0-0.png", "text, expected an image"), ("0-1.dcm", "0-1.dcm: text, expected an image")],
)
def test_a_bad_scan_is_one_line(tmp_path: Path, spoil: str, said: str) -> None:
    (scans(tmp_path / "d") / spoil).write_text("no picture")
    with pytest.raises(DataError, match=said) as told:
        MEDICAL_IMAGING.read(tmp_path / "d", DATA, {})
    assert spoil in str(told.value) and "\n" not in str(told.value)


def test_the_mean_over_hospitals_leaves_out_those_without_a_finding() -> None:
    """A perfect model: its AUROC is 1 where there are findings, and undefined elsewhere."""
    here: dict[str, float | None] = {"auroc": 1.0, "accuracy": 1.0, "examples": 4}
    clients = {f"hospital-{i}": {**here, "auroc": 1.0 if i < 3 else None} for i in range(6)}
    (note,) = personalization_notes(job(evaluate={"adapt": 2}), None, with_adapted(clients, clients), "auroc")
    assert "mean over 3 of 6 clients: AUROC 1.000; before them 1.000" in note
    means = personalization_metrics("norms", clients, clients)
    assert means["global"]["auroc"] == means["clients"]["auroc"] == 1.0
    assert personalization_metrics("norms", {"a": clients["hospital-5"]}, {})["clients"]["auroc"] is None


def test_no_patient_is_on_two_sides(tmp_path: Path) -> None:
    from atoll.server.run.test_set import hold_out
    from atoll.sim.population.partition import partition

    asked = job(federation={"clients": 3})
    table = MEDICAL_IMAGING.read(scans(tmp_path / "d"), DATA, {})
    train, test = hold_out(table, asked)
    assert len(test) and not set(train["patient"]) & set(test["patient"])
    from atoll.learning.learner import ranked
    from atoll.server.run.test_set import unit_keys

    order = ranked(unit_keys(MEDICAL_IMAGING, train), asked.seed, "partition")
    assignment = partition(train, order, asked, MEDICAL_IMAGING.groups(train))
    parts = [{train[int(row)]["patient"] for row in assignment.rows([c])[0]} for c in range(3)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    shard = MEDICAL_IMAGING.shard(train, FACTS)
    kept, held = MEDICAL_IMAGING.split(shard, 5, 0.3)
    assert held and sorted(kept + held) == list(range(len(shard)))
    assert not {shard.groups[row] for row in kept} & {shard.groups[row] for row in held}


def job(**tables: object) -> Job:
    table: dict[str, object] = {
        "name": "small",
        "seed": 5,
        "task": {"name": "medical-imaging"},
        "data": {"source": "./here"},
        "backbone": {"name": "torchvision:resnet18", "weights": "random", "image_size": 32},
    }
    return Job.parse(table | tables, origin="test")


def test_the_metric_over_clients_is_that_of_all_data(tmp_path: Path) -> None:
    table = MEDICAL_IMAGING.read(scans(tmp_path / "d"), DATA, {})
    learner = Learner.of(job(), task_named("medical-imaging"), FACTS)
    shard = learner.task.shard(table.train, FACTS)
    tensors = learner.initial()
    parts = [shard.select(range(0, 10)), shard.select(range(10, 13)), shard.select(range(13, len(shard)))]
    over_clients = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    together = learner.compute(learner.evaluate(tensors, shard))
    assert set(together) == {"auroc", "sensitivity", "calibration_error", "accuracy", "loss"}
    assert over_clients == pytest.approx(together, rel=1e-6)


def test_a_test_set_of_one_class_has_no_auroc(tmp_path: Path) -> None:
    table = MEDICAL_IMAGING.read(scans(tmp_path / "d"), DATA, {})
    learner = Learner.of(job(), task_named("medical-imaging"), FACTS)
    shard = learner.task.shard(table.train, FACTS)
    healthy = shard.select(torch.nonzero(shard.table == 0).flatten().tolist())
    found = learner.compute(learner.evaluate(learner.initial(), healthy))
    assert found["auroc"] is None and found["sensitivity"] is None
    assert found["accuracy"] is not None and found["loss"] is not None


@pytest.mark.parametrize("classes", [2, 3])
def test_a_perfect_prediction_has_auroc_1_and_a_constant_one_a_half(classes: int) -> None:
    targets = torch.arange(30) % classes
    perfect = 9.0 * torch.nn.functional.one_hot(targets, classes)
    for outputs, wanted in ((perfect, 1.0), (torch.zeros(30, classes), 0.5)):
        metrics = MEDICAL_IMAGING.metrics({"classes": list("abc"[:classes])})
        metrics.update(*MEDICAL_IMAGING.metric_inputs(outputs, targets))
        assert float(metrics.compute()["auroc"]) == pytest.approx(wanted)
