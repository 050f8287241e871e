"""The benchmarks run, and print what they promise; how fast anything is, is not tested."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_rel

from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.artifacts.mixer import save_mixer
from ssl_samix.artifacts.results import read_rows
from ssl_samix.data.datasets import load_splits
from ssl_samix.mixup.mixer import SAMix
from ssl_samix.models.backbone import Backbone
from ssl_samix.types import Batch, MixPlan
from tests.conftest import mixed_method, samix_here

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


TINY = ["--width", "4", "--size", "16", "--batch", "8", "--rounds", "1"]


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run a benchmark in this process, which saves it its imports; return its header and tables."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()

    def run(name, *words):
        importlib.import_module(name).main([str(word) for word in words])
        return read(capsys.readouterr().out)

    yield run
    torch.set_num_threads(threads)


def read(text):
    """Split what a benchmark prints into its header and its tables, rows as dicts."""
    header, *parts = text.split("\n\n")
    header += "\n" + parts[0]
    tables = []
    for part in parts[1:]:
        cells = [line[2:-2].split(" | ") for line in part.strip().splitlines()]
        assert all(len(row) == len(cells[0]) for row in cells), part
        assert set(cells[1]) == {"---"}
        tables.append([dict(zip(cells[0], row, strict=True)) for row in cells[2:]])
    return header, tables


def check_goals(rows):
    for row in rows:
        assert list(row) == ["what", "target", "measured", "met"]
        assert row["met"] in ("yes", "no")


def test_step_time(bench):
    policies = "none,samix,samix-paper"
    words = ["--methods", "byol", "--policies", policies, "--precision", "auto,32-true"]
    header, (rows, goals) = bench("step_time", *TINY, *words)
    for part in ("torch ", " on cpu (", "threads 1", "precision ", "batch 8", "width 4"):
        assert part in header
    assert [row["side"] for row in rows][:4] == ["lightly as shipped", *policies.split(",")]
    for row in rows:
        assert min(float(row["ms"]), float(row["images/s"])) > 0
        if row["side"] != "lightly as shipped":
            # What the model leaves out, the Mixer and the losses, shows, but not by much.
            counted, model = float(row["FLOPs / plain"]), float(row["passes / plain"])
            assert abs(counted / model - 1) < 0.05, row
    assert [row["what"].split()[:2] for row in goals] == [["BYOL", "step:"], *[["BYOL", "+"]] * 2]
    check_goals(goals)


def test_step_time_without_lightly_and_memory_of_a_process(bench, capsys):
    words = ["--methods", "simclr", "--policies", "none", "--no-lightly"]
    _, (rows,) = bench("step_time", *TINY, *words, "--set", "optimizer.lr=0.1")
    assert [row["side"] for row in rows] == ["none"]
    importlib.import_module("step_time").main(
        [*TINY, "--memory-of", "simclr", "samix", "32-true"]  # what its own process prints
    )
    assert float(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("step_time", ("--methods", "moco,dino"), "--methods: 'dino' is not one of"),
        ("step_time", ("--policies", "x"), "--policies: 'x' is not one of"),
        ("step_time", ("--rounds", "0"), "--rounds is at least 1"),
        ("step_time", ("--batch", "4"), "--batch is at least 8"),
        ("step_time", ("--set", "optimizer.lrr=1", "--no-lightly"), "optimizer.lr"),
        ("epoch_time", ("--batch", "99999"), "--batch is at least 8, and at most"),
        ("epoch_time", ("--data", "nowhere"), "--data: nowhere is not a folder"),
        ("knn_baselines", ("data.limmit=64",), "data.limit"),
        ("views", ("--sizes", "33"), "--sizes: '33' is not one of"),
        ("mixer", ("--batch", "1"), "--batch is at least 2"),
        ("targets", ("nowhere",), "nowhere is not a folder"),
        ("mixer_truth", ("make", "made", "--val", "9"), "--val must be"),
        ("mixer_truth", ("make", "made", "--size", "50"), "--size must be a multiple of 4"),
        ("mixer_truth", ("make", BENCHMARKS), "benchmarks exists already"),
        ("mixer_truth", ("measure", "nowhere", "no-run"), "no-run"),
        ("mixer_truth", ("measure", "nowhere", "x", "--picture", "x.jpg"), "ends in .png"),
    ],
)
def test_a_mistake_is_one_sentence(name, words, said, bench, capsys):
    with pytest.raises(SystemExit) as caught:
        bench(name, *words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_flop_model_says_what_the_design_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    model = importlib.import_module("flop_model")
    expected = {"samix": (1.88, 1.58, 1.44), "samix-paper": (2.5, 2.07, 1.62)}
    for policy, ratios in expected.items():
        for method, ratio in zip(("moco", "simclr", "byol"), ratios, strict=True):
            assert model.ratio(method, policy) == pytest.approx(ratio, abs=0.01)


def test_mixer_learning(bench, tmp_path):
    run = tmp_path / "run"
    small = ["data.limit=64", "data.batch_size=32", "backbone.width=8", "trainer.max_epochs=1"]
    small += ["trainer.precision=32-true"]  # bfloat16 tells masks apart that are equal
    samix_here("pretrain", "method=simclr", "mixup=none", *small, f"out={run}", cwd=tmp_path)
    resting = "mixup.mask=anchored mixup.lr=1e-6"
    _, (rows,) = bench("mixer_learning", "--epochs", "1", run, "mixup=samix", resting)
    assert [row.pop("Mixer") for row in rows] == ["mixup=samix", resting]
    first, second = ({name: float(cell) for name, cell in row.items()} for row in rows)
    assert first["flat local"] == second["flat local"]
    assert first["local"] != first["flat local"]
    # A Mixer of the anchored form that does not move is plain mixup, to the last printed digit.
    assert second["local"] == pytest.approx(second["flat local"], abs=0.0011)
    assert second["global"] == pytest.approx(second["flat global"], abs=0.0011)
    assert (second["slope"], second["mask_std"]) == (1.0, 0.0)


@pytest.fixture
def digits(bench, tmp_path, capsys):
    importlib.import_module("mixer_truth").main(
        ["make", str(tmp_path / "set"), "--train", "40", "--val", "20"]
    )
    capsys.readouterr()
    return tmp_path / "set"


def test_scenes_are_what_their_files_say(digits, bench, tmp_path, capsys):
    scenes = importlib.import_module("truth_scenes")
    splits = load_splits("folder", digits, "auto", None)
    assert (len(splits.train), len(splits.val), splits.image_size) == (40, 20, 48)
    assert splits.classes == tuple("0123456789")
    for split, found in scenes.ingredients().items():
        for number, scene in enumerate(scenes.scenes(found, split, 20, 48, 0)):
            name = Path(split, str(number % 10), f"{number:05d}.png")
            with Image.open(digits / name) as file:
                image = np.asarray(file)
            with Image.open(tmp_path / "set-masks" / name) as file:
                cover = np.asarray(file)
            np.testing.assert_array_equal(image, scene.image)
            np.testing.assert_array_equal(cover, scene.object)
            np.testing.assert_array_equal(image[cover == 0], scene.background[cover == 0])
            whole = image[cover == 255].astype(int)
            assert len(np.unique(whole, axis=0)) == 1, "a digit is of one colour"
            assert 0.01 < (cover >= 128).mean() < 0.4
            apart = whole[0] - scene.background[cover == 255].mean(axis=0)
            assert np.linalg.norm(apart) > 80, "it can be seen"
    again = ["make", digits, "--train", "10", "--val", "10"]
    with pytest.raises(SystemExit, match="2"):
        bench("mixer_truth", *again)
    assert "exists already" in capsys.readouterr().err


def test_mixer_truth(digits, bench, tmp_path):
    backbone = Backbone("resnet18", image_size=48, width=4)
    settings = {"channels": backbone.map_spec(3).channels, "form": "anchored"}
    meta = {"image_size": 48, "mean": [0.5] * 3, "std": [0.25] * 3}
    meta |= {"backbone": backbone.settings}
    meta |= {"mixer": {"stage": 3, "settings": settings}}
    policy = SAMix(**settings)
    torch.nn.init.zeros_(policy.block.value[3].weight)  # plain mixup to the bit
    mixer, picture = tmp_path / "mixer.safetensors", tmp_path / "masks.png"
    save_mixer(mixer, backbone, policy, meta)
    words = ["measure", digits, mixer, "--pairs", "50", "--rows", "2", "--picture", picture]
    _, (rows,) = bench("mixer_truth", *words)
    lines = {(row.pop("masks"), row.pop("ratios")): row for row in rows}
    assert len(lines) == 2 * 6
    for ratios in ("Beta(2, 2)", "0.5"):
        flat = lines["plain mixup", ratios]
        assert lines[str(mixer), ratios] == flat
        assert flat["object contrast"].lstrip("-") == "0.0000 ± 0.0000"
        assert flat["slope"] == ("-" if ratios == "0.5" else "1.000")
        assert (flat["mask_std"], flat["mask_mean_error"]) == ("0.000", "0.000")
        perfect = lines["perfect", ratios]
        assert perfect["object contrast"] == "1.0000 ± 0.0000"
        assert (perfect["in partner's object"], perfect["in own object"]) == ("1.000", "0.000")
        assert 0.5 < float(lines["coarse", ratios]["object contrast"].split()[0]) < 1
        assert lines["FMix", ratios]["mask_mean_error"] == "0.000"
        assert {int(row["pairs"]) + int(row["skipped"]) for row in rows} == {50}
    with Image.open(picture) as file:
        assert len(file.convert("RGB").getcolors(1 << 24) or ()) > 100, "not a blank page"


def test_object_contrast_of_known_masks(bench):
    truth = importlib.import_module("mixer_truth")
    images, lam = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0.3, 0.3, 0.3])
    own, other = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    own[:, 0], other[:2, 1:3] = 1, 1
    own[1, 1] = 1  # of both objects, and so of neither
    other[2, 0] = 1  # the second object has no pixel of its own
    pairs = truth.Pairs(images, images, own, other)
    for masks, expected in ((truth.plain, 0), (truth.perfect, 1)):
        seen = truth.observe(pairs, lam, masks(pairs, lam[None])[0])
        assert seen.counted.tolist() == [True, True, False]
        assert (seen.contrast() - expected).abs().max() < 1e-6
    rising = torch.tensor([0.0, 0.2, 0.4, 1.0])[:, None].expand(3, 1, 4, 4)
    assert truth.observe(pairs, lam, rising).contrast().tolist() == pytest.approx([0.3, 0.4])


def test_mixer_oracle(bench, tmp_path):
    small = ["data.limit=256", "data.batch_size=64", "backbone.width=8", "trainer.max_epochs=1"]
    small += ["trainer.precision=32-true", "method=simclr", "callbacks.knn.val_limit=20"]
    run = tmp_path / "run"
    samix_here("pretrain", "mixup=samix", *small, f"out={run}", cwd=tmp_path)
    _, (rows,) = bench("mixer_oracle", "score", run, "--steps", "10", "--batches", "1")
    own = {row["masks"]: float(row["own loss"]) for row in rows}
    assert own["oracle"] < own["flat"] - 0.01
    assert all(float(row["gradient"]) > 0 < float(row["encoder's loss"]) for row in rows)
    assert float(rows[-1]["share of the gain"]) == 1.0
    assert float(rows[-1]["mask_std"]) > 0.01
    words = ["train", "--steps", "2", "--objective", "local", "--out", tmp_path / "oracle"]
    _, (rows,) = bench("mixer_oracle", *words, "--csv", tmp_path / "rows.csv", *small)
    assert [row["objective"] for row in rows] == ["local"]
    assert 0 <= float(rows[0]["knn_top1"]) <= 100
    before = (tmp_path / "rows.csv").read_text()
    bench("mixer_oracle", *words, "--csv", tmp_path / "rows.csv", *small)  # it is done
    assert (tmp_path / "rows.csv").read_text() == before


def test_an_oracle_has_the_shares_that_were_drawn_and_does_not_move_the_teacher(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    oracle = importlib.import_module("mixer_oracle")
    method = mixed_method("simclr", "samix")
    before = {n: t.clone() for n, t in method.state_dict().items()}
    seek = oracle.Oracle("both", 3, backbone=method.backbone)
    views = tuple(torch.randn(6, 3, 16, 16) for _ in range(2))
    images = Batch(views, torch.full((6,), -1), torch.arange(6))
    plan = seek.draw(views[0])
    method.eval()
    mixed = seek.mixtures(method, images, plan, 0, 1)
    torch.testing.assert_close(1 - mixed.mask.mean(dim=(1, 2, 3)), plan.lam, rtol=0, atol=1e-3)
    assert mixed.mask.flatten(1).std(dim=1).min() > 0.01
    assert all(torch.equal(t, before[n]) for n, t in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize(
    ("method", "names"),
    [pytest.param("simclr", "unmix,sdmp", marks=pytest.mark.slow), ("moco", "imix")],
)
def test_rivals(bench, tmp_path, method, names):
    small = ["data.limit=256", "data.batch_size=64", "backbone.width=4", "trainer.max_epochs=1"]
    small += ["trainer.precision=32-true", f"method={method}", "callbacks.knn.val_limit=20"]
    words = ["--rivals", names, "--out", tmp_path / "rivals", *small]
    _, (rows,) = bench("rivals", *words)
    assert [(row["method"], row["rival"]) for row in rows] == [
        (method, n) for n in names.split(",")
    ]
    assert len({(row["knn_top1"], row["linear_top1"]) for row in rows}) == len(rows)


@pytest.mark.slow
def test_out_of_the_box(bench, tmp_path):
    sides = "default,lightly-byol,untrained,pixels"
    words = ["--sides", sides, "--minutes", "0.01", "--out", tmp_path / "out", "--csv"]
    words += [tmp_path / "rows.csv", "data=digits", "data.limit=64", "backbone.width=4"]
    _, (rows,) = bench("out_of_the_box", *words)
    assert [row["side"] for row in rows] == sides.split(",")
    assert len({row["knn_top1"] for row in rows}) == 4
    assert all(float(row["linear_top1"]) > 10 for row in rows)
    before = (tmp_path / "rows.csv").read_bytes()
    bench("out_of_the_box", *words)  # does nothing again
    assert (tmp_path / "rows.csv").read_bytes() == before


@pytest.mark.slow
def test_per_second(bench, tmp_path):
    words = [
        "--variants",
        "same67,progressive_none",
        "--minutes",
        "0.01",
        "--out",
        tmp_path / "out",
    ]
    words += ["--csv", tmp_path / "rows.csv", "data=digits", "data.limit=64", "backbone.width=4"]
    _, (rows,) = bench("per_second", *words)
    assert [row["variant"] for row in rows] == ["same67", "progressive_none"]
    assert all(float(row[f"linear{of}"]) > 10 for row in rows for of in ("", "_ema", "_bn"))
    loaded = {name: load_encoder(tmp_path / "out" / "same67-s0" / name) for name in ("ema", "bn")}
    assert not torch.equal(*(e.backbone.trunk.conv1.weight for e in loaded.values()))


def test_what_mixtures_have_in_common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rivals = importlib.import_module("rivals")
    lam, rows = torch.tensor([0.75, 0.5, 1.0]), torch.arange(3)
    found = rivals.overlaps(MixPlan(lam=lam, partner=torch.tensor([1, 2, 0]), rows=rows))
    # Mixture 0: 3/4 of image 0, 1/4 of 1; mixture 1: 1/2 of 1, 1/2 of 2; mixture 2: image 2.
    common = torch.tensor([[1.0, 0.25, 0.0], [0.25, 1.0, 0.5], [0.0, 0.5, 1.0]])
    torch.testing.assert_close(found, common / common.sum(dim=1, keepdim=True))


def test_mixed_barlow_twins_ask_nothing_of_what_is_not_mixed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rivals = importlib.import_module("rivals")
    method = mixed_method("barlow_twins", "mixup")
    objective = rivals.made("mixed_barlow", method.backbone)
    views = tuple(torch.randn(6, 3, 16, 16) for _ in range(2))
    images = Batch(views, torch.full((6,), -1), torch.arange(6))
    losses = {}
    for share in (1.0, 0.5):
        plan = MixPlan(torch.full((6,), share), torch.arange(6).roll(1), torch.arange(6))
        monkeypatch.setattr(objective, "draw", lambda _, plan=plan: plan)
        with method.memory.step():
            losses[share] = float(objective(method, images, 0, 10).losses["mix"].detach())
    assert losses[1.0] < 1e-6
    assert losses[0.5] > 1e-3


@pytest.mark.slow
def test_beyond(bench, tmp_path, capsys):
    small = ["data.limit=100", "data.batch_size=50", "backbone.width=16", "trainer.max_epochs=1"]
    runs = [tmp_path / name for name in ("plain-s0", "plain-s1", "mixed-s0", "mixed-s1")]
    for run in runs:
        words = [f"mixup={'none' if 'plain' in run.name else 'mixup'}", f"seed={run.name[-1]}"]
        samix_here("pretrain", "method=simclr", *words, *small, f"out={run}", cwd=tmp_path)
    words = ["--reference", "plain", "--csv", tmp_path / "beyond.csv"]
    bench("beyond", runs[0], *words, "--only", "labels-10")
    _, (rows,) = bench("beyond", *runs, *words, "--only", "linear,robustness,digits-knn")
    lines = {row.pop(""): row for row in rows}
    assert list(lines)[:2] == [
        "10% of labels, fine-tuned",
        "10% of labels, L-BFGS on frozen features",
    ]
    assert list(lines)[2:4] == ["linear", "clean images, L-BFGS"]

    def top1(run):
        file = run / "results" / "beyond" / "digits-knn" / "results.json"
        (chosen,) = (r for r in json.loads(file.read_text())["results"] if r["variant"] == "chosen")
        return chosen["numbers"]["top1"]

    plain, mixed = (np.array([top1(run) for run in pair]) for pair in (runs[:2], runs[2:]))
    width = ttest_rel(mixed, plain).confidence_interval(0.95)
    half = (width.high - width.low) / 2
    assert lines["digits, knn"] == {
        **{
            name: f"{x.mean():.2f} ± {x.std(ddof=1):.2f}"
            for name, x in (("plain", plain), ("mixed", mixed))
        },
        "difference": f"{(mixed - plain).mean():+.2f} ± {half:.2f}",
    }
    table = read_rows(tmp_path / "beyond.csv")
    file = runs[3] / "results" / "beyond" / "robustness" / "results.json"
    curve = json.loads(file.read_text())["details"]["corruptions"]["linear"]["contrast"]["top1"]
    name = "contrast, strength "
    of_run = [r for r in table if (r["run"], r["seed"]) == ("mixed", "1")]
    strengths = {r["measure"]: float(r["value"]) for r in of_run if r["measure"].startswith(name)}
    assert strengths == {f"{name}{i + 1}": pytest.approx(v, abs=1e-3) for i, v in enumerate(curve)}
    for run in runs:
        shutil.rmtree(run)  # what the table has is not measured again
    (tmp_path / "beyond.png").unlink()
    (again,) = bench("beyond", *words)[1]
    assert {row.pop(""): row for row in again} == lines
    with Image.open(tmp_path / "beyond.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10, "not a blank page"
    with pytest.raises(SystemExit, match="2"):
        bench("beyond", tmp_path / "plain-s0", *words)
    assert "holds no encoder.safetensors" in capsys.readouterr().err


def test_knn_baselines(bench):
    words = [
        "data.limit=64",
        "backbone.width=8",
        "data.batch_size=32",
        "callbacks.knn.val_limit=50",
    ]
    _, (rows,) = bench("knn_baselines", *words)
    assert [row[""] for row in rows] == ["raw pixels", "untrained encoder"]
    for row in rows:
        assert 0 <= float(row["kNN top-1, k = 20"]) <= 100
        assert float(row["RankMe"]) >= 1


def test_views(bench):
    words = ["--batch", "4", "--pictures", "2", "--rounds", "1", "--methods", "moco,byol"]
    header, (rows,) = bench("views", *words, "--sizes", "32,224")
    assert "batch 4" in header
    assert [(row["px"], row["method"], row["from"]) for row in rows] == [
        (size, method, source)
        for size in ("32", "224")
        for method in ("moco", "byol")
        for source in ("memory", "JPEG")
    ]
    for row in rows:
        ways = ("PIL (lightly)", "workers", "batched", "in two parts")
        times = {way: float(row[f"{way} us"]) for way in ways}
        assert times[row["fastest"]] == min(times.values()) > 0


def test_eval_time(bench):
    sizes = ["--train", "600", "--test", "300", "--dim", "256", "--classes", "3"]
    _, (rows,) = bench("eval_time", *sizes)  # and no target, which is for other sizes
    assert [row[""].split(",")[0] for row in rows] == [
        "24 heads on all images",
        "kNN",
        "heads",
        "L-BFGS",
    ]
    assert all(50 < float(row["top-1"]) <= 100 for row in rows)


def test_epoch_time(bench):
    sizes = ["--images", "64", "--batch", "16", "--workers", "1", "--methods", "byol"]
    _, (rows, goals) = bench("epoch_time", *TINY, *sizes, "--policy", "samix")
    assert [row["side"] for row in rows] == ["lightly as shipped", "ours"]
    for row in rows:
        assert float(row["epoch s"]) > 0
        assert 0 <= float(row["waiting %"]) < 100
    assert float(rows[1]["lightly / ours"]) > 0
    assert len(goals) == 3
    check_goals(goals)


def test_epoch_time_of_files(bench, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    sizes = ["--images", "16", "--batch", "8", "--workers", "1", "--methods", "simclr"]
    _, (rows, goals) = bench("epoch_time", *TINY, *sizes, "--data", tmp_path)
    assert len(rows) == 2
    check_goals(goals)


def test_mixer(bench):
    words = ["--channels", "64,128", "--sides", "4,8", "--batch", "2", "--rounds", "1"]
    _, (rows, shares) = bench("mixer", *words)
    assert [(row["channels"], row["positions"]) for row in rows] == [
        (channels, side) for side in ("4 x 4", "8 x 8") for channels in ("64", "128")
    ]
    for row in rows:
        assert min(float(row[f"{name} ms"]) for name in ("explicit", "chunked", "fused")) > 0
    # A small stem's third stage is small beside its ResNet; a bottleneck's has many channels.
    assert [row["backbone"] for row in shares] == ["resnet18", "resnet18", "resnet50", "resnet50"]
    assert 0.5 < float(shares[0]["share %"]) < float(shares[2]["share %"]) < 20


def test_all_forms_of_attention_agree(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    attentions = importlib.import_module("mixer").ATTENTIONS
    query, key, value = torch.randn(2, 8, 900), torch.randn(2, 8, 900), torch.randn(2, 1, 900)
    expected = attentions["explicit"](query, key, value)
    for attention in attentions.values():
        torch.testing.assert_close(attention(query, key, value), expected)


def test_a_stopped_table_keeps_its_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def rows():
        yield ["1", "2"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("common").print_table(("a", "b"), rows())
    assert capsys.readouterr().out == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_targets_collects_what_was_printed(bench, tmp_path, capsys):
    goals = importlib.import_module("goals")
    goals.print_goals({"heads": 11.0, "wait": 6.5})
    (tmp_path / "eval.md").write_text("## Protocols\n" + capsys.readouterr().out)
    importlib.import_module("targets").main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(goals.GOALS)
    found = {cells[0]: cells[1:] for cells in (line[2:-2].split(" | ") for line in lines)}
    assert found[goals.GOALS["heads"].what] == ["<= 15 s", "11.00 s", "yes", "eval.md"]
    assert found[goals.GOALS["wait"].what][1:3] == ["6.50%", "no"]
    assert found[goals.GOALS["cifar"].what][1:] == ["not measured", "", ""]


def test_a_part_that_takes_too_long_does_not_stop_the_others(bench, tmp_path, capsys):
    gpu = importlib.import_module("gpu")
    words = ["--device", "cpu", "--parts", "eval,views", "--limit", "1"]
    assert gpu.main([str(tmp_path), *words]) == 1
    printed = capsys.readouterr().out
    for name in ("eval", "views"):
        assert f"| {name} | stopped after 1 s |" in printed
        assert (tmp_path / f"{name}.log").exists()
    assert "not measured" in (tmp_path / "targets.md").read_text()
