"""Supervised training from the outside: what a run learns, leaves behind, and refuses."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_samix
from ssl_samix.config.compose import compose
from ssl_samix.data.datasets import load_splits
from ssl_samix.evaluation.features import extract
from ssl_samix.evaluation.measures import top1_top5

TINY = {"data.limit": 256, "data.batch_size": 64, "backbone.width": 8}


def colours(root, names=("blue", "red"), count=12, val=True):
    """A folder of images whose class is their colour."""
    shades = {"blue": (30, 30, 220), "red": (220, 30, 30), "green": (30, 220, 30)}
    generator = np.random.default_rng(0)
    for split in ("train", "val") if val else ("train",):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.integers(-30, 30, (16, 16, 3))
                pixels = np.clip(noise + shades[name], 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    root = colours(folder / "colours")
    return ssl_samix.train_supervised(
        root,
        folder / "run",
        **{"data.batch_size": 8, "backbone.width": 8, "trainer.max_epochs": 16},
        **{"classifier.heads": "two"},
        # Its files are measured again in float32.
        **{"trainer.precision": "32-true"},
    )


def test_what_can_be_learned_is_learned(run):
    assert run.metrics["val/top1"] == 100
    assert run.metrics["val/ema_top1"] == 100
    assert run.metrics["val/mix_top1"] == 100
    assert run.metrics["val/ema_mix_top1"] == 100
    assert {"mixer/local", "mixer/mask_std", "loss/own", "loss/mix"} <= run.metrics.keys()
    names = {p.name for p in run.out.iterdir()}
    assert {"encoder.safetensors", "classifier.safetensors", "mixer.safetensors"} <= names
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "config.yaml", "mixing"} <= names


def test_the_files_hold_the_networks_that_were_measured(run):
    """Loaded again, both networks have the loss of the last row, and the encoder is theirs."""
    splits = load_splits("folder", run.out.parent / "colours", 16, None)
    for network, prefix in (("online", "val/"), ("ema", "val/ema_")):
        for source in (run.out, run.out / "last.ckpt"):
            classifier = ssl_samix.load_classifier(source, network)
            assert classifier.classes == ("blue", "red")
            logits = extract(
                classifier,
                splits.val,
                range(len(splits.val)),
                splits.mean,
                splits.std,
                device=torch.device("cpu"),
            )
            loss = torch.nn.functional.cross_entropy(logits, splits.val.labels).item()
            assert loss == pytest.approx(run.metrics[f"{prefix}loss"], rel=1e-4)
            assert top1_top5(logits, splits.val.labels) == (100, 100)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        run.classifier.head(run.encoder(images)), run.classifier(images), rtol=1e-5, atol=1e-6
    )


def two_steps(out, **settings):
    """Two optimizer steps of SAMix on digits."""
    words = {**TINY, "data.limit": 128, "trainer.max_epochs": 1, "trainer.precision": "32-true"}
    return ssl_samix.train_supervised("digits", out, **words, **settings)


def test_samix_teaches_two_heads_and_exports_the_plain_images(tmp_path, capsys):
    run = two_steps(tmp_path / "run", **{"classifier.heads": "two"})
    assert "top-1 of their head" in capsys.readouterr().out
    checkpoint = torch.load(run.out / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    plain, mixed = state["projector.weight"], state["mixed_projector.weight"]
    assert plain.shape == mixed.shape == (10, 64)
    assert not torch.equal(plain, mixed)
    assert not torch.equal(state["mixed_twin.module.weight"], mixed)
    # Both heads on the same features give what metrics.csv says of either.
    splits = load_splits("digits", None, 16, 128)
    loaded = {name: ssl_samix.load_classifier(run.out, name) for name in ("online", "ema")}
    for source in (run.out, run.out / "last.ckpt"):
        assert torch.equal(ssl_samix.load_classifier(source).head.weight, plain)
    heads = {
        "val/": (loaded["online"], "projector."),
        "val/mix_": (loaded["online"], "mixed_projector."),
        "val/ema_": (loaded["ema"], "twin.module.1."),
        "val/ema_mix_": (loaded["ema"], "mixed_twin.module."),
    }
    for prefix, (classifier, name) in heads.items():
        classifier.head.weight.data = state[f"{name}weight"]
        classifier.head.bias.data = state[f"{name}bias"]
        logits = extract(
            classifier, splits.val, range(len(splits.val)), splits.mean, splits.std,
            device=torch.device("cpu"),
        )  # fmt: skip
        top1, top5 = top1_top5(logits, splits.val.labels)
        loss = torch.nn.functional.cross_entropy(logits, splits.val.labels).item()
        wanted = {"top1": top1, "top5": top5, "loss": loss}
        for key, value in wanted.items():
            assert run.metrics[f"{prefix}{key}"] == pytest.approx(value, rel=1e-4), (prefix, key)


def test_a_run_from_before_there_were_two_heads_goes_on_with_one(tmp_path, fails):
    run = two_steps(tmp_path / "run", **{"classifier.heads": "one"})
    assert "val/mix_top1" not in run.metrics
    config = (run.out / "config.yaml").read_text()
    assert "  heads: one\n" in config
    (run.out / "config.yaml").write_text(config.replace("  heads: one\n", ""))
    again = ssl_samix.train_supervised(resume=run.out, **{"trainer.max_epochs": 2})
    state = torch.load(again.out / "last.ckpt", weights_only=True)["state_dict"]
    assert not [key for key in state if key.startswith("mixed_")]
    (again.out / "classifier.safetensors").unlink()
    loaded = ssl_samix.load_classifier(again.out)  # from last.ckpt
    assert torch.equal(loaded.head.weight, state["projector.weight"])
    words = [f"{key}={value}" for key, value in TINY.items()]
    said = fails(
        "supervised", *words, "data.limit=128", "trainer.precision=32-true", "trainer.max_epochs=2",
        "classifier.heads=two", f"out={run.out}",
    )  # fmt: skip
    assert "(classifier.heads is one there, two here)" in said


def test_a_picture_becomes_a_class(run):
    classifier = run.classifier
    image = Image.new("RGB", (40, 30), (210, 40, 40))
    logits = classifier(classifier.prepare(image)[None])
    assert classifier.classes[int(logits.argmax())] == "red"


def test_its_mixer_mixes_elsewhere(run):
    mixed = ssl_samix.load_mixer(run.out)(torch.randn(4, 3, 16, 16))
    assert mixed.images.shape == (4, 3, 16, 16)


def test_robustness_is_measured(run, capsys):
    from ssl_samix.cli.main import main

    main(["robustness", f"run={run.out}", f"out={run.out / 'robust'}"])
    shown = capsys.readouterr().out
    assert re.findall(r"^(\w+) +top-1 100\.00%", shown, re.M) == ["online", "ema"]
    assert "ECE" in shown
    with (run.out / "results.csv").open() as file:
        found = {row["variant"]: row for row in csv.DictReader(file)}
    assert found["online"]["top1"] == "100"
    assert 0 <= float(found["ema"]["fgsm_top1"]) <= 100


def test_both_networks_are_measured_under_corruptions(run, capsys):
    from ssl_samix.cli.main import main

    main(["robustness", f"run={run.out}", f"out={run.out / 'corrupted'}", "corruptions=true"])
    shown = capsys.readouterr().out.splitlines()
    # colours survive noise, blur, contrast and JPEG
    assert [line.split()[0] for line in shown[:2]] == ["online", "ema"]
    assert all("corrupted top-1 100.00%" in line for line in shown[:2])
    with (run.out / "results.csv").open() as file:
        last = list(csv.DictReader(file))[-2:]
    assert [row["variant"] for row in last] == ["online", "ema"]
    assert {row["gaussian_noise_top1"] for row in last} == {"100"}


def test_it_starts_from_a_pretrained_encoder(run, tmp_path):
    settings = {
        "data.batch_size": 8, "backbone.width": 8, "trainer.max_epochs": 1, "mixup": "none",
    }  # fmt: skip
    again = ssl_samix.train_supervised(
        run.out.parent / "colours", tmp_path / "again", init=run.out,
        **{**settings, "optimizer.lr": 1e-9},
    )  # fmt: skip
    for name, weight in again.encoder.backbone.named_parameters():
        before = run.encoder.backbone.get_parameter(name)
        torch.testing.assert_close(weight, before, rtol=0, atol=1e-6)
    with pytest.raises(ssl_samix.UserError, match="choose the same backbone"):
        ssl_samix.train_supervised(
            run.out.parent / "colours", tmp_path / "other", init=run.out,
            **{**settings, "backbone.width": 16},
        )  # fmt: skip


def test_policies_and_erasing_reach_the_images(tmp_path):
    """Augmentation per image, in this process and from memory, trains as any other."""
    run = ssl_samix.train_supervised(
        "digits", tmp_path / "run", augment="randaugment",
        **{**TINY, "trainer.max_epochs": 1, "data.workers": 0},
    )  # fmt: skip
    assert run.metrics["loss"] > 0
    assert compose("supervised", ["augment=randaugment"])[0].augment.erasing == 0.25


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision, tmp_path):
    """A fused optimizer cannot clip in mixed precision: another is taken then."""
    settings = {**TINY, "data.limit": 64, "trainer.max_epochs": 1, "optimizer": "sgd"}
    settings |= {"trainer.precision": precision, "optimizer.lr": 1.0, "mixup": "none"}
    settings |= {"optimizer.weight_decay": 0, "optimizer.warmup_epochs": 0}
    moved = []
    for norm in (1e-4, None):
        clip = {"trainer.gradient_clip_val": norm}
        run = ssl_samix.train_supervised("digits", tmp_path / f"{norm}", **settings, **clip)
        before = torch.load(run.out / "last.ckpt", weights_only=True)
        buffers = before["optimizer_states"][0]["state"].values()
        moved.append(sum(s["momentum_buffer"].square().sum() for s in buffers).sqrt().item())
    assert moved[0] == pytest.approx(1e-4, rel=1e-2)
    assert moved[1] > 1e-2


def refused(fails, *words):
    return fails("supervised", *words)


def test_unlabelled_data_are_refused(fails, tmp_path):
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    words = ["data=folder", f"data.root={tmp_path}", "data.batch_size=4"]
    assert "supervised training needs labels" in refused(fails, *words, f"out={tmp_path / 'r'}")
    assert not (tmp_path / "r").exists()


def test_a_class_without_images_is_refused(fails, tmp_path):
    root = colours(tmp_path / "data")
    (root / "train" / "violet").mkdir()
    words = ["data=folder", f"data.root={root}", "data.batch_size=4", f"out={tmp_path / 'r'}"]
    assert "no training image of violet" in refused(fails, *words)
    for name in sorted(p.name for p in (root / "train").iterdir())[1:]:
        for image in (root / "train" / name).glob("*"):
            image.unlink()
    assert "needs labels (no image is in " in refused(fails, *words)


def test_a_label_outside_the_class_list_is_refused(tmp_path, monkeypatch):
    from ssl_samix.data import datamodule

    def broken(*args, **settings):
        splits = load_splits(*args, **settings)
        splits.train.labels[3] = 17
        return splits

    monkeypatch.setattr(datamodule, "load_splits", broken)
    with pytest.raises(ssl_samix.UserError, match="outside the 10 classes, such as 17"):
        ssl_samix.train_supervised("digits", tmp_path / "r", **TINY)


def test_another_number_of_classes_is_told_with_both_numbers(fails, run, tmp_path):
    root = colours(tmp_path / "three", ("blue", "green", "red"))
    words = [f"resume={run.out}", f"data.root={root}", "trainer.max_epochs=17"]
    assert "a classifier of 2 classes, the data have 3" in refused(fails, *words)
    words = [f"run={run.out}", "data=folder", f"data.root={root}"]
    assert "knows 2 classes and the data have 3" in fails("robustness", *words)
    other = colours(tmp_path / "other", ("blue", "green"))
    words = [f"run={run.out}", "data=folder", f"data.root={other}"]
    assert "class 1 is red for the classifier and green in the data" in fails("robustness", *words)


def test_a_diverged_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    settings = {**TINY, "mixup": "none", "trainer.max_epochs": 2, "seed": 3}
    good = ssl_samix.train_supervised("digits", tmp_path / "run", **settings)
    checkpoint = torch.load(good.out / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["projector.weight"].fill_(float("inf"))
    torch.save(checkpoint, good.out / "last.ckpt")
    before = (good.out / "last.ckpt").read_bytes()
    with pytest.raises(
        ssl_samix.UserError, match=r"loss became NaN or infinite at step 8, at learning"
    ) as e:
        ssl_samix.train_supervised(resume=good.out, **{"trainer.max_epochs": 4})
    assert "last.ckpt holds the last complete epoch" in str(e.value)
    assert (good.out / "last.ckpt").read_bytes() == before, "it was overwritten"


def test_clusters_and_other_commands_runs_are_refused(fails, run, tmp_path):
    said = refused(fails, "mixup=samix_c")
    assert said == "samix: samix supervised has no method.output_dim, which mixup=samix_c reads"
    said = fails("pretrain", f"resume={run.out}")
    assert said.endswith("is a run of samix supervised: resume it with that")
    assert "unknown augment 'crop_flop'" in refused(fails, "augment=crop_flop")
    assert "did you mean 'classifier.smoothing'" in refused(fails, "classifier.smothing=0.1")
    assert "there is no checkpoint" in refused(fails, f"init={tmp_path / 'none.ckpt'}")
    (tmp_path / "file.safetensors").write_bytes(b"no")
    said = fails("robustness", f"run={tmp_path / 'file.safetensors'}", "data=digits")
    assert "is damaged or no safetensors file" in said
