"""What is logged of a Mixer: numbers that cannot be good while it is dead."""

from __future__ import annotations

import pytest
import torch

import ssl_samix
from ssl_samix.methods.classifier import Classifier
from ssl_samix.mixup.samix_objective import EVERY_STEP_SHARE, GAIN_EVERY, slope
from ssl_samix.training.guards import FLAT
from ssl_samix.training.logging import read_metrics
from tests.conftest import METHODS, mixed_method
from tests.test_invariants import batch, terms_of

MEASURED = GAIN_EVERY - 1  # the first step in which a Mixer that always learns is compared


def test_the_slope_of_shares_on_ratios():
    ratio = torch.rand(50)
    assert slope(ratio, ratio).item() == pytest.approx(1)
    assert slope(ratio, torch.full((50,), 0.4)).item() == pytest.approx(0, abs=1e-6)
    assert slope(ratio, 0.5 - 0.3 * ratio).item() == pytest.approx(-0.3)
    assert slope(torch.full((4,), 0.5), torch.rand(4)).isfinite()  # one and the same ratio


def start(mixer, deviation):
    """Set the two layers that the masks' logits come from: 0 gives flat masks."""
    block = mixer.mixing.policy.block
    for layer in (block.value[3], block.place[3]):
        torch.nn.init.normal_(layer.weight, std=deviation)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("mixing", ["samix", "samix_c"])
def test_a_mixer_whose_masks_are_flat_gains_nothing(name, mixing):
    method = mixed_method(name, mixing, mask="exact", eta=0.5)
    start(method, 0)
    logs = terms_of(method, step=MEASURED).logs
    assert logs["mixer/gain"].item() == pytest.approx(0, abs=1e-4)
    assert logs["mixer/ratio_slope"].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_gain_is_what_flat_masks_lose_more(name):
    """The same pairs and ratios, once by strong masks and once by flat ones."""
    settings = {"eta": 0.5, "temperature": 0.01}  # so that little counts
    strong = mixed_method(name, "samix", **settings).eval()
    flat = mixed_method(name, "samix", **settings).eval()
    flat.load_state_dict(strong.state_dict())
    start(strong, 30.0)
    start(flat, 0)
    first, second = (terms_of(m, step=MEASURED).logs for m in (strong, flat))
    lost = {k: second[f"mixer/{k}"] - first[f"mixer/{k}"] for k in ("local", "global")}
    expected = lost["local"] + 0.5 * lost["global"]
    assert abs(expected) > 1e-3
    torch.testing.assert_close(first["mixer/gain"], expected, rtol=1e-3, atol=3e-5)


def test_flat_masks_are_compared_now_and_then():
    method = mixed_method("moco", "samix", update_every=2)
    measured = [step for step in range(30) if "mixer/gain" in terms_of(method, step=step).logs]
    assert measured == [8, 18, 28]


def test_masks_that_ignore_their_ratio_are_seen_as_such():
    method = mixed_method("simclr", "samix", mask="paper", update_every=1)
    torch.nn.init.zeros_(method.mixing.policy.block.value[3].weight)
    logs = terms_of(method).logs
    assert logs["mixer/ratio_slope"].item() == pytest.approx(0, abs=1e-4)


def test_a_mixer_learns_in_every_step_of_the_beginning():
    method = mixed_method("moco", "samix", update_every=4)
    learned = []
    for step in range(13):
        with method.memory.step():
            logs = method.mixing(method, batch(), step, 100).logs
        learned += [step] if "mixer/local" in logs else []
    assert learned == [*range(round(EVERY_STEP_SHARE * 100)), 8, 12]


SETTINGS = {
    "data.limit": 256,
    "data.batch_size": 32,
    "trainer.max_epochs": 25,  # 8 steps each
    "trainer.accelerator": "cpu",
    "callbacks.pictures.every_n_epochs": 25,
    "callbacks.knn.every_n_epochs": 25,
    "callbacks.knn.val_limit": 50,
    "callbacks.checkpoint.every_n_epochs": 25,
    "backbone.name": "resnet10",
    "backbone.width": 16,
}


QUICK = ("simclr", "supervised")  # a method with a twin of its own, and a classifier
TRAINED = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in [*sorted(METHODS), "supervised"]
]


@pytest.mark.parametrize("name", TRAINED)
def test_the_shipped_mixer_is_alive_in_every_method(name, tmp_path):
    settings = dict(SETTINGS)
    if name == "supervised":
        settings = {k: v for k, v in settings.items() if "knn" not in k}
        run = ssl_samix.train_supervised("digits", tmp_path / "run", **settings)
    else:
        settings |= {"method.queue_size": 128} if name == "moco" else {}
        settings |= {"optimizer.lr": 0.5} if name in ("swav", "dino") else {}  # none is automatic
        run = ssl_samix.pretrain("digits", name, tmp_path / "run", **settings)
    rows = read_metrics(run.out / "metrics.csv")
    assert min(float(row["mixer/ratio_slope"]) for row in rows) > 0.9
    assert max(float(row["mixer/mask_mean_error"]) for row in rows) < 0.02
    late = rows[len(rows) // 2 :]
    assert min(float(row["mixer/mask_std"]) for row in late) > FLAT
    gains = [float(row["mixer/gain"]) for row in late if row["mixer/gain"]]
    # SwAV's encoder hardly learns from so few digits, and a Mixer has nothing to gain from it.
    assert sum(gains) / len(gains) > (-0.01 if name == "swav" else 0)


@pytest.mark.parametrize(("name", "weights"), [("moco", (1, 0)), ("byol", (1, 0))])
def test_what_the_configuration_leaves_to_the_method(name, weights):
    method = mixed_method(name, "samix", eta="auto", local_weight="auto")
    assert method.mixing.term_weights(method) == weights
    logs, losses = (terms := terms_of(method)).logs, terms.losses
    torch.testing.assert_close(losses["mixer"].detach(), logs["mixer/local"])
    given = mixed_method(name, "samix", eta=0.3, local_weight="auto")
    assert given.mixing.term_weights(given) == (1, 0.3)


def test_with_labels_the_mixer_learns_the_global_term():
    assert Classifier.mixer_weights == (0, 1)
