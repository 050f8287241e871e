"""The monitor on a small run, and its files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssl_samix.config.compose import build, compose
from ssl_samix.errors import ConfigError
from ssl_samix.training.guards import RunCheckpoint
from ssl_samix.training.logging import MetricsCSV, read_metrics
from ssl_samix.training.monitors import KNNMonitor

CPU = torch.device("cpu")


def data(*words):
    config, _ = compose("pretrain", ["data.batch_size=32", *words])
    return build(config.data, views=build(config.views), seed=0)


@pytest.fixture(scope="module")
def digits():
    return data()


def test_raw_pixels_of_digits_are_a_known_answer(digits):
    """Nearest neighbours on the pixels solve this data set: scikit-learn agrees."""
    from sklearn.neighbors import KNeighborsClassifier

    measured = KNNMonitor(k=(1,)).measure_encoder(nn.Flatten(), digits, CPU)
    mean = torch.tensor(digits.splits.mean)[:, None, None]
    std = torch.tensor(digits.splits.std)[:, None, None]
    rows = [
        ((s.load(range(len(s))) / 255 - mean) / std).flatten(1).numpy()
        for s in (digits.splits.train, digits.splits.val)
    ]
    reference = KNeighborsClassifier(1, metric="cosine").fit(rows[0], digits.splits.train.labels)
    accuracy = 100 * reference.score(rows[1], digits.splits.val.labels)
    assert measured["knn/top1"] == pytest.approx(accuracy, abs=0.3)
    assert accuracy > 95


def test_all_measures_are_reported_where_there_are_labels(digits):
    measured = KNNMonitor().measure_encoder(nn.Flatten(), digits, CPU)
    assert set(measured) == {
        "knn/top1", "knn/top5", "knn/top1_k200", "knn/top5_k200", "rankme", "alignment",
        "uniformity",
    }  # fmt: skip
    assert measured["alignment"] > 0


def test_a_measurement_disturbs_nothing(digits):
    """Neither the random numbers of the training nor the encoder's statistics or mode."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    encoder[1].eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = KNNMonitor(bank_limit=100, val_limit=50).measure_encoder(encoder, digits, CPU)
    assert torch.equal(torch.rand(4), expected)
    assert [m.training for m in encoder] == [True, False, True]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    again = KNNMonitor(bank_limit=100, val_limit=50).measure_encoder(encoder, digits, CPU)
    assert first == again


def test_the_automatic_interval_keeps_the_cost_below_a_twentieth(digits):
    monitor = KNNMonitor()
    passes = 2 * 250 + 1438 + 359
    interval = monitor.interval(digits)
    assert passes / (interval * 4 * 1438) <= 0.05
    assert passes / ((interval - 1) * 4 * 1438) > 0.05
    assert KNNMonitor(every_n_epochs=3).interval(digits) == 3
    assert KNNMonitor(bank_limit=100, val_limit=50).interval(digits) < interval


@pytest.mark.parametrize(
    "settings",
    [{"every_n_epochs": 0}, {"k": []}, {"k": [0]}, {"temperature": 0}, {"bank_limit": -5}],
)
def test_settings_outside_their_range(settings):
    with pytest.raises(ConfigError):
        KNNMonitor(**settings)


def test_metrics_are_whole_rows_and_a_resume_replaces_what_it_repeats(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path, KNNMonitor())
    for epoch in range(3):
        log.write(epoch, 10 * (epoch + 1), {"loss": 1.0 / (epoch + 1)})
    resumed = MetricsCSV(path, KNNMonitor())
    resumed.write(2, 30, {"loss": 7.0, "knn/top1": 50.0})
    resumed.write(3, 40, {"loss": 8.0})
    rows = read_metrics(path)
    assert [r["epoch"] for r in rows] == ["0", "1", "2", "3"]
    assert [r["loss"] for r in rows] == ["1", "0.5", "7", "8"]
    assert [r["knn/top1"] for r in rows] == ["", "", "50", ""]
    assert rows[0]["step"] == "10"


def test_a_moved_run_keeps_its_best(tmp_path):
    before = RunCheckpoint(tmp_path / "old", "best", monitor="knn/top1", mode="max")
    path = str(tmp_path / "old" / "best.ckpt")
    before.best_model_path, before.best_model_score = path, torch.tensor(80.0)
    before.best_k_models, before.kth_best_model_path = {path: torch.tensor(80.0)}, path
    after = RunCheckpoint(tmp_path / "new", "best", monitor="knn/top1", mode="max")
    after.load_state_dict(before.state_dict())
    assert float(after.best_model_score) == 80.0
    assert list(after.best_k_models) == [str(tmp_path / "new" / "best.ckpt")]
    with pytest.raises(ConfigError, match="every_n_epochs"):
        RunCheckpoint(tmp_path, "last", 0)
