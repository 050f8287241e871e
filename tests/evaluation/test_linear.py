"""The linear probe against scikit-learn and on data with known answers, and what it refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from ssl_samix.data.subsets import hold_out
from ssl_samix.errors import ConfigError, DataError
from ssl_samix.evaluation.linear import (
    Examples,
    Grid,
    Scaling,
    choose,
    logistic_regression,
    measure,
    near,
    probe,
    train_heads,
)


@pytest.mark.parametrize(("free", "moved"), [(4 * 64, True), (4 * 64 - 1, False)])
def test_heads_are_trained_on_a_gpu_with_room_for_them(free, moved, monkeypatch):
    """A meta tensor is moved in name only."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    device = type("Device", (), {"type": "cuda"})()
    monkeypatch.setattr(torch.Tensor, "to", lambda given, where: (given, where))
    features = torch.ones(4, 4)  # 64 bytes
    assert near(features, torch.device("cpu")) is features
    assert (near(features, device) == (features, device)) is moved


FEW = Grid(learning_rates=(1.0, 10.0, 100.0), weight_decays=(0.0, 1e-5), epochs=20)


def whole(features, labels):
    rows = torch.arange(len(features))
    return Examples(features, labels, rows, Scaling(features, rows))


def clusters(classes=5, each=60, noise=0.1):
    labels = torch.arange(classes).repeat(each)
    return 10 * torch.eye(classes)[labels] + noise * torch.randn(len(labels), classes), labels


def noisy(n=400, classes=3):
    """Classes that overlap, so that settings differ."""
    labels = torch.arange(n) % classes
    return torch.randn(classes, 6)[labels] + 1.5 * torch.randn(n, 6), labels


@pytest.fixture(scope="module")
def digits():
    pixels, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float(), labels[order]
    return pixels[:1350], labels[:1350], pixels[1350:], labels[1350:]


@pytest.mark.parametrize("classes", [2, 5])
def test_separable_classes_are_perfect(classes):
    train, labels = clusters(classes)
    test, answers = clusters(classes, each=20)
    heads = probe(train, labels, test, answers, classes, FEW)
    lbfgs = logistic_regression(train, labels, test, answers, classes, cs=(0.1, 1.0))
    assert (heads.top1, heads.top5, lbfgs.top1, lbfgs.top5) == (100, 100, 100, 100)


def test_random_labels_are_chance():
    train, test = torch.randn(1000, 8), torch.randn(1000, 8)
    labels, answers = torch.arange(1000) % 10, torch.randint(10, (1000,))
    for found in (
        probe(train, labels, test, answers, 10, FEW),
        logistic_regression(train, labels, test, answers, 10, cs=(0.01, 1.0)),
    ):
        assert abs(found.top1 - 10) < 4 * 100 * math.sqrt(0.1 * 0.9 / 1000)
        assert abs(found.top5 - 50) < 4 * 100 * math.sqrt(0.5 * 0.5 / 1000)


def test_a_collapsed_encoder_is_chance():
    same, labels = torch.full((40, 3), 2.5), torch.arange(40) % 2
    assert probe(same, labels, same, labels, 2, FEW).top1 == 50


@pytest.mark.parametrize(
    ("way", "extra"), [(probe, {"grid": FEW}), (logistic_regression, {"cs": (1e-3, 0.1, 10.0)})]
)
def test_the_test_labels_do_not_choose(way, extra):
    (train, labels), (test, answers) = noisy(), noisy()
    honest = way(train, labels, test, answers, 3, **extra)
    shuffled = way(train, labels, test, (answers + 1) % 3, 3, **extra)
    assert (honest.setting, honest.held_out) == (shuffled.setting, shuffled.held_out)
    assert honest.top1 != shuffled.top1


def test_held_out_labels_choose_and_are_not_learned():
    train, labels = noisy()
    found = probe(train, labels, train, labels, 3, FEW, seed=5, held_out_share=0.3)
    kept, held = hold_out(labels, 0.3, 5)
    scaling = Scaling(train, kept)
    pairs = [(s["learning_rate"], s["weight_decay"]) for s in FEW.settings()]
    heads = train_heads(Examples(train, labels, kept, scaling), 3, pairs, 20, 256, 5)
    top1, _, loss = measure(heads, Examples(train, labels, held, scaling))
    assert [row["top1"] for row in found.held_out] == top1.tolist()
    assert [row["loss"] for row in found.held_out] == loss.tolist()
    # and the chosen head learns them too
    chosen = (found.setting["learning_rate"], found.setting["weight_decay"])
    final = train_heads(whole(train, labels), 3, [chosen], 20, 256, 5)
    assert found.top1 == measure(final, whole(train, labels))[0].item()


def test_the_seed_decides():
    train, labels = noisy()
    first, again, other = (probe(train, labels, train, labels, 3, FEW, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.held_out != other.held_out


def test_heads_agree_with_lbfgs_on_digits(digits):
    heads, lbfgs = probe(*digits, 10), logistic_regression(*digits, 10)
    assert lbfgs.converged
    assert abs(heads.top1 - lbfgs.top1) <= 0.5
    assert heads.top1 > 94


def test_logistic_regression_is_scikit_learns(digits):
    train, labels, test, answers = digits
    found = logistic_regression(*digits, 10, cs=(0.02,))
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.02, max_iter=1000).fit(scaler.transform(train), labels)
    assert found.top1 == pytest.approx(100 * model.score(scaler.transform(test), answers), abs=0.12)
    kept, held = hold_out(labels, 0.1, 0)
    scaler = StandardScaler().fit(train[kept])
    model = LogisticRegression(C=0.02, max_iter=1000).fit(
        scaler.transform(train[kept]), labels[kept]
    )
    loss = log_loss(labels[held], model.predict_proba(scaler.transform(train[held])))
    assert found.held_out[0]["loss"] == pytest.approx(loss, rel=1e-2)


def test_two_classes_have_scikit_learns_loss():
    train, labels = noisy(classes=2)
    found = logistic_regression(train, labels, train, labels, 2, cs=(0.1,))
    kept, held = hold_out(labels, 0.1, 0)
    scaler = StandardScaler().fit(train[kept])
    model = LogisticRegression(C=0.1).fit(scaler.transform(train[kept]), labels[kept])
    loss = log_loss(labels[held], model.predict_proba(scaler.transform(train[held])))
    assert found.held_out[0]["loss"] == pytest.approx(loss, rel=1e-2)
    assert found.top5 == 100


@pytest.mark.parametrize("classes", [2, 5])
def test_the_head_is_the_fitted_model_on_features_as_they_are(classes, monkeypatch):
    """Its logits are scikit-learn's decision function, standardised features being its input."""
    fitted = []

    class Spy(LogisticRegression):
        def fit(self, *data):
            fitted.append(self)
            return super().fit(*data)

    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", Spy)
    train, labels = noisy(classes=classes)
    train = 3 * train + torch.arange(train.shape[1])  # neither mean 0 nor variance 1
    train[:, 0] = 4.5  # what does not vary tells nothing
    before = torch.get_rng_state()
    found = logistic_regression(train, labels, train, labels, classes, cs=(0.1,))
    assert torch.equal(torch.get_rng_state(), before), "random numbers of what follows were drawn"
    with torch.no_grad():
        logits = found.head(train)
    expected = torch.from_numpy(fitted[-1].decision_function(StandardScaler().fit_transform(train)))
    if classes == 2:
        expected = torch.stack([torch.zeros_like(expected), expected], dim=1)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)
    right = (logits.argmax(dim=1) == labels).double().mean()
    assert found.top1 == pytest.approx(100 * right.item())
    assert not found.head.weight[:, 0].any()


def test_a_fit_that_did_not_converge_says_so(caplog):
    train, labels = noisy()
    with caplog.at_level(logging.WARNING):
        found = logistic_regression(train, labels, train, labels, 3, cs=(1.0,), max_iter=1)
    assert not found.converged
    assert not found.held_out[0]["converged"]
    assert "max_iter=1" in caplog.text
    assert logistic_regression(train, labels, train, labels, 3, cs=(1.0,)).converged


def rows(*results):
    return [{"lr": lr, "top1": top1, "loss": loss} for lr, top1, loss in results]


def test_of_settings_within_one_standard_error_the_lowest_loss_is_chosen(caplog):
    settings = [{"lr": lr} for lr in (1, 2, 3, 4)]
    # of 100 images, 90% has a standard error of 3
    held_out = rows((1, 86.0, 0.1), (2, 87.5, 0.3), (3, 90.0, 0.4), (4, 89.0, 0.5))
    assert choose(held_out, settings, 100, "lr", "lrs") == {"lr": 2}
    assert choose(held_out, settings, 10_000, "lr", "lrs") == {"lr": 3}
    assert choose(held_out, settings, 30, "lr", "lrs") == {"lr": 1}
    assert not caplog.records  # others inside the grid are as good
    assert choose([], settings, 0, "lr", "lrs") == {"lr": 2}


@pytest.mark.parametrize(("best", "edge"), [(1, "lowest"), (3, "highest")])
def test_a_winner_at_the_edge_is_told(caplog, best, edge):
    settings = [{"lr": lr} for lr in (1, 2, 3)]
    held_out = rows(*((lr, 90.0 if lr == best else 50.0, 1.0) for lr in (1, 2, 3)))
    choose(held_out, settings, 100, "lr", "lrs")
    assert caplog.messages == [f"lr={best} won and is the {edge} tried: widen lrs"]


def test_learning_rates_that_are_all_too_low_are_told(caplog):
    train, labels = clusters(each=200, noise=8.0)
    grid = Grid((1e-3, 1e-2, 1e-1), (0.0,), epochs=2)
    assert probe(train, labels, train, labels, 5, grid).setting["learning_rate"] == 0.1
    assert caplog.messages == [
        "learning_rate=0.1 won and is the highest tried: widen learning_rates"
    ]


def test_one_image_per_class_takes_the_middle_of_the_grid(caplog):
    train, labels = clusters(each=1)
    found = probe(train, labels, train, labels, 5, FEW)
    assert found.setting == {**FEW.settings()[2], "epochs": 20}
    assert (found.held_out, found.top1) == ([], 100)
    assert "too few images" in caplog.text
    assert logistic_regression(train, labels, train, labels, 5, cs=(1, 2, 3)).setting == {"C": 2}


def test_no_class_loses_its_last_image_to_the_choice():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5])  # half of 7 would take both images of class 5
    train = 10 * torch.eye(6)[labels]
    found = probe(train, labels, train, labels, 6, FEW, held_out_share=0.5)
    assert (found.held_out, found.top1) == ([], 100)


def test_small_sets_are_passed_more_often():
    assert Grid().epochs_for(100) == 2000
    assert Grid().epochs_for(45_000) == 12
    assert Grid().epochs_for(1_281_167) == 10
    assert Grid(epochs=7).epochs_for(100) == 7


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: d["train"].__setitem__((3, 1), math.nan), "training features hold NaN"),
        (lambda d: d["test"].__setitem__((3, 1), math.inf), "test features hold NaN or infinity"),
        (lambda d: d.update(classes=4), "1 of 4 classes have no training image.* class 3"),
        (lambda d: d["train_labels"].fill_(1), "2 of 3 classes have no training image.* class 0"),
        (lambda d: d.update(classes=2), "training labels must be 0 to 1, got 2"),
        (lambda d: d["test_labels"].fill_(-1), "test labels must be 0 to 2, got -1"),
        (lambda d: d.update(classes=1), "at least 2 classes, got 1"),
        (lambda d: d.update(test=d["test"][:5]), "5 test features cannot have 400 labels"),
    ],
)
@pytest.mark.parametrize("way", [probe, logistic_regression])
def test_what_cannot_be_learned_is_told_in_one_sentence(way, spoil, sentence):
    (train, train_labels), (test, test_labels) = noisy(), noisy()
    data = {"train": train, "train_labels": train_labels, "test": test, "test_labels": test_labels}
    data["classes"] = 3
    spoil(data)
    with pytest.raises(DataError, match=sentence):
        way(**data)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rates": ()}, "learning_rates needs at least one"),
        ({"learning_rates": (0.0,)}, "learning_rates must be"),
        ({"weight_decays": (-1e-3,)}, "weight_decays must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        (
            {"weight_decays": (0.02,)},
            "learning_rates up to 300 diverge with weight_decays up to 0.02",
        ),
    ],
)
def test_a_grid_that_cannot_work_is_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Grid(**settings)


def test_other_values_out_of_range_are_refused():
    train, labels = noisy()
    with pytest.raises(ConfigError, match="held_out_share must be"):
        probe(train, labels, train, labels, 3, held_out_share=0.6)
    with pytest.raises(ConfigError, match="cs must be"):
        logistic_regression(train, labels, train, labels, 3, cs=(0.0,))
    with pytest.raises(ConfigError, match="max_iter must be"):
        logistic_regression(train, labels, train, labels, 3, max_iter=0)
