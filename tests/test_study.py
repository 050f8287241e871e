"""``samix study``: the plan, the statistics, the table, and a study that is killed and resumed."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import cache, reduce
from itertools import count, product
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image
from scipy import stats

from ssl_samix.artifacts.results import write_rows
from ssl_samix.config.compose import compose, keys_set, parse, plain, quote_paths
from ssl_samix.config.key_types import converted
from ssl_samix.errors import ConfigError, Interrupted, UserError
from ssl_samix.reporting import study as command
from ssl_samix.reporting import study_jobs, study_pictures
from ssl_samix.reporting.study import Launcher, list_runs, main, parse_study, seconds_left
from ssl_samix.reporting.study_costs import COLUMNS as COSTS
from ssl_samix.reporting.study_costs import Costs
from ssl_samix.reporting.study_jobs import Job, RunJob, locked, log_excerpt, processor
from ssl_samix.reporting.study_measure import Candidate, _Clustering, measured
from ssl_samix.reporting.study_pictures import (
    COLOURS,
    Gaps,
    Panel,
    Series,
    _cost_panels,
    chart,
    differences,
    front,
    write_figure,
)
from ssl_samix.reporting.study_plan import KEYS, read_study
from ssl_samix.reporting.study_table import (
    COLUMNS,
    add_row,
    paired,
    read_table,
    report,
    spread,
    write_report,
)
from tests.conftest import samix_here

ROOT = Path(__file__).resolve().parent.parent
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
TINY = ["data.limit=256", "data.batch_size=32", "backbone.width=4"]
STUDY = {
    "base": ["data=digits", *TINY],
    "methods": {"moco": ["method=moco", "method.queue_size=64"], "simclr": ["method=simclr"]},
    "policies": {"none": ["mixup=none"], "samix": ["mixup=samix"]},
    "seeds": [0],
    "length": {"epochs": 2},
    "workers": 1,
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Write a study file with some keys changed, and read it."""
    monkeypatch.chdir(tmp_path)

    def write(**changed):
        given = {"out": "runs", **STUDY, **changed}
        kept = {key: value for key, value in given.items() if value is not None}
        Path("study.yaml").write_text(json.dumps(kept))  # which is YAML
        return read_study(Path("study.yaml"))

    return write


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"polices": {}}, "unknown key 'polices': did you mean 'policies'?"),
        ({"methods": None}, "it lacks methods"),
        ({"length": {"epoch": 2}}, "did you mean 'epochs'"),
        ({"length": {"epochs": 2, "cpu_seconds": 3}}, "length needs one of epochs and cpu_seconds"),
        ({"length": {"epochs": [1, 0]}}, "length.epochs needs whole numbers from 1, got 0"),
        ({"seeds": {"default": [0], "samx": [1]}}, "did you mean 'samix'"),
        ({"seeds": {"none": [0]}}, "seeds says nothing of samix"),
        ({"seeds": [-1]}, "seeds.default needs whole numbers from 0, got -1"),
        ({"base": ["seed=3"]}, "seed is given by the study"),
        ({"base": "data=digits"}, "base must be a list"),
        ({"policies": {"none": ["mixup"]}}, "'mixup', which is not of the form key=value"),
        ({"policies": {"a-b": []}}, "a name is of letters"),
        ({"reference": "nine"}, "did you mean 'none'"),
        ({"evaluate": ["lineal"]}, "did you mean 'linear'"),
        ({"workers": 0}, "workers needs auto or whole numbers from 1, got 0"),
        ({"launcher": "slum"}, "did you mean 'slurm'"),
        ({"slurm": {"partion": "gpu"}}, "did you mean 'partition'"),
        ({"slurm": {"timeout_min": "1 h"}}, "slurm.timeout_min needs whole numbers from 0"),
        ({"command": "pretrian"}, "did you mean 'pretrain'"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(changed, sentence, study):
    with pytest.raises(ConfigError) as caught:
        study(**changed)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("study.yaml: ")


def test_what_is_not_a_study_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the study nowhere\.yaml"):
        read_study(Path("nowhere.yaml"))
    texts = {
        "a: [": "is not YAML",
        "- a": "needs keys",
        "seeds: [0]\nlength: {epochs: 1}\nmethods: {a: []}\npolicies: {off: []}": "got False",
    }
    for text, sentence in texts.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            read_study(tmp_path / "bad.yaml")


def test_of_several_words_for_a_key_the_last_wins(study):
    plan = study(
        base=["data.root=file", "data=folder", "data.limit=64", "data.root=typed"],
        methods={"moco": ["method=moco"]},
        policies={"none": ["mixup=none", "data.limit=128"]},
    )
    words = ("data=folder", "data.root=typed", "method=moco", "mixup=none", "data.limit=128")
    assert plan.runs()[0].words == words


def test_mistakes_of_the_command_line(study, fails):
    study(policies={"none": ["mixup=none"], "odd": ["mixup=samx"]})
    assert "moco with odd: unknown mixup 'samx': did you mean 'samix'?" in fails(
        "study", "study.yaml"
    )
    assert "did you mean 'report'" in fails("study", "study.yaml", "reprot=true")
    assert "study needs one file" in fails("study")
    assert "unknown list 'yes'" in fails("study", "study.yaml", "list=yes")
    assert "does not exist" in fails("study", "study.yaml", "data=folder", "data.root=nowhere")
    study(base=["data=digits", "data.limit=64,128"])
    assert "has several values" in fails("study", "study.yaml")


def test_the_benchmark_is_the_command():
    script = ROOT / "benchmarks" / "study.py"
    words = [sys.executable, script, "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown.startswith("samix study: a table of runs")
    for key in KEYS:
        assert f"\n{key}:" in shown


def test_the_plan(study):
    plan = study(seeds={"default": [0], "none": [1, 0]}, length={"epochs": [4, 1]})
    names = [run.name for run in plan.runs()]
    assert names[:6] == [
        "moco-none-e1-s0", "moco-samix-e1-s0", "simclr-none-e1-s0", "simclr-samix-e1-s0",
        "moco-none-e1-s1", "simclr-none-e1-s1",
    ]  # fmt: skip
    assert len(names) == 12
    assert plan.training(plan.runs()[1], 7) == [
        "pretrain", "data=digits", *TINY, "method=moco", "method.queue_size=64", "mixup=samix",
        "trainer.max_epochs=7", "seed=0", "out=runs/moco-samix-e1-s0",
    ]  # fmt: skip
    assert (plan.reference, plan.evaluate) == ("none", ("knn", "linear"))
    assert plan.csv == Path("runs/study.csv")
    assert study(command="supervised").evaluate == ()


def test_words_of_the_command_line_come_last(study):
    study(slurm={"timeout_min": 60, "partition": "cpu"})
    words = ["data.limit=8", "workers=3", "out=o", "launcher=slurm", "slurm.partition=gpu"]
    request = parse_study(["study.yaml", *words, "list=true"])
    assert request.study.base[-1] == "data.limit=8"
    assert (request.study.workers, str(request.study.out)) == (3, "o")
    assert request.study.launcher == "slurm"
    assert request.study.slurm == {"timeout_min": 60, "partition": "gpu"}
    assert request.listing


def test_a_list_tells_what_is_done_before_torch_is_imported(study):
    study(length={"cpu_seconds": [60]})
    code = (
        "import sys\n"
        "from ssl_samix.cli.main import main; main(['study', 'study.yaml', 'list=true'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["0 of 4 done", "False"]
    assert "'trainer.max_epochs=<measured>' seed=0 out=runs/moco-none-t60-s0" in lines[1]
    assert lines[2].split() == [
        "samix", "knn", "run=runs/moco-none-t60-s0", "out=runs/moco-none-t60-s0/results/study-knn"
    ]  # fmt: skip


@cache
def composed(command, *choices):
    return compose(command, choices)[0]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_with_it(path):
    plan = read_study(path)
    for method, policy in product(plan.methods, plan.policies):
        given = dict(word.split("=") for word in plan.words(method, policy))
        mixup = given["mixup"] if method == next(iter(plan.methods)) else "none"
        chosen = [f"method={given['method']}"] if "method" in given else []
        config = composed(plan.command, "data=folder", *chosen, f"mixup={mixup}")
        for override in parse(quote_paths(plan.words(method, policy))):
            key = override.key_or_group
            if "." in key and (mixup != "none" or not key.startswith("mixup.")):
                [own] = keys_set(config, key, override.value())
                default = reduce(dict.__getitem__, own.split("."), plain(config))
                converted(own, override.value(), default)
    assert plan.csv == Path("docs/results") / f"{path.stem}.csv"
    assert f"{len(plan.runs())} runs" in path.read_text().replace("\n# ", " ")


def test_statistics_agree_with_scipy():
    ours, theirs = {"0": 45.1, "1": 46.0, "2": 44.8}, {"0": 44.0, "1": 45.5, "2": 44.4, "3": 40.0}
    gap = paired(ours, theirs)
    expected = stats.ttest_rel([45.1, 46.0, 44.8], [44.0, 45.5, 44.4]).confidence_interval(0.95)
    assert gap.seeds == 3
    assert (gap.mean - gap.half_width, gap.mean + gap.half_width) == pytest.approx(expected)
    assert spread([1, 2, 4]).deviation == pytest.approx(1.5275, abs=1e-4)
    assert spread([1]).deviation is None
    assert paired({"0": 3.0}, {"0": 1.0}).half_width is None
    assert paired({"0": 3.0}, {"1": 1.0}) is None


def row(run, **numbers):
    method, policy, length, seed = run.key
    given = {
        "method": method, "policy": policy, "length": length, "seed": seed, "epochs": 2,
        "seconds": 20, "cpu_seconds": 30, "settings": run.settings, **numbers,
    }  # fmt: skip
    return {name: str(value) for name, value in given.items()}


def test_rows_are_merged_and_compared_with_the_reference(study):
    plan = study()
    none, samix = plan.runs()[:2]
    plan.csv.parent.mkdir()
    stranger = row(none) | {"policy": "gone"}
    write_rows(plan.csv, COLUMNS, [stranger])
    rows = add_row(plan, row(samix, cpu_ms_per_step=30))
    assert rows[samix.key]["step_ratio"] == ""
    rows = add_row(plan, row(none, cpu_ms_per_step=20))
    assert rows[samix.key]["step_ratio"] == "1.500"
    elsewhere = row(samix, cpu_ms_per_step=30, precision="bf16-mixed")
    assert add_row(plan, elsewhere)[samix.key]["step_ratio"] == "", "faster, and not by the policy"
    with plan.csv.open() as file:
        written = list(csv.DictReader(file))
    assert [r["policy"] for r in written] == ["none", "samix", "gone"], "in the plan's order"
    other = study(base=["data=digits", "data.limit=300"])
    with pytest.raises(UserError, match=r"moco-none-e2-s0 with other words .*data.limit=300"):
        read_table(other)
    moved = study(base=[*STUDY["base"], "data.root=/elsewhere"])
    assert len(read_table(moved)) == 3, "the same runs on another machine"
    plan.csv.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="damaged"):
        read_table(plan)


def test_the_report(study):
    plan = study(seeds=[0, 1, 2], methods={"moco": []}, length={"epochs": 2})
    tops = {("none", 0): 40, ("none", 1): 41, ("none", 2): 42, ("samix", 0): 42, ("samix", 1): 42}
    rows = [
        row(run, knn_top1=tops[run.policy, run.seed], step_ratio=1.5)
        for run in plan.runs()
        if (run.policy, run.seed) in tops
    ]
    text = "\n".join(report(plan, rows))
    assert "5 of 6 runs." in text
    assert "| moco | none | 3 | 2 | 1.50 | 30 | – | 41.00 ± 1.00 | – |" in text
    assert (
        "| moco | samix | 2 | 2 | 1.50 | 30 | – | 42.00 ± 0.00 | +1.50 (-4.85 to +7.85) |" in text
    )
    assert "42.00 ± – | +2.00 (–)" in "\n".join(report(plan, [rows[0], rows[1]]))
    plan.csv.parent.mkdir()
    write_report(plan, rows)
    for name in ("front", "differences"):
        assert f"![](study-{name}.png)" in plan.csv.with_suffix(".md").read_text()
    assert not plan.csv.with_name("study-epochs.png").exists(), "no run folder is here"


def test_a_chart_shows_each_series_and_the_front(tmp_path):
    assert front([(1, 40), (1.5, 39), (2, 43), (3, 43)]) == [(1, 40), (2, 43)]
    first = Series("a", [(0, 1), (1, 2)], [0.5, 0.0])
    second = Series("b", [(0.5, 1.5)], joined=False)
    panels = [Panel("one", [first], [(0, 1), (1, 2)]), *[Panel("more", [second, first])] * 3]
    write_figure(tmp_path / "chart.png", chart(panels, "x", "y"))
    picture = Image.open(tmp_path / "chart.png").convert("RGB")
    found = {
        f"#{red:02x}{green:02x}{blue:02x}" for _, (red, green, blue) in picture.getcolors(1 << 24)
    }
    assert set(COLOURS[:-1]) & found == set(COLOURS[:2])
    figure = chart(panels, "x", "y")
    assert [axes.get_title() for axes in figure.axes] == ["one", "more", "more", "more"]
    looks = [[line.get_color() for line in axes.get_lines()] for axes in figure.axes]
    assert [COLOURS[1] in look for look in looks] == [False, True, True, True]
    assert all(COLOURS[0] in look for look in looks), "a name has one look in all panels"


def test_a_legend_of_long_names_fits():
    names = [f"a_policy_with_a_long_name_{i}" for i in range(10)]
    for panels in (1, 3):
        series = [Series(name, [(0, 1), (1, 2)]) for name in names]
        figure = chart([Panel("one", series)] * panels, "x", "y")
        figure.savefig(io.BytesIO())
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_seconds_of_another_processor_do_not_count(study):
    plan = study(length={"cpu_seconds": [9]}, methods={"moco": []}, seeds=[0, 1, 2])
    clocks = [("a", 1), ("a", 3), ("b", 100)]
    rows = [
        {**row(run), "processor": name, "cpu_seconds": seconds, "knn_top1": 40 + run.seed}
        for run in plan.runs()
        if run.policy == "none"
        for name, seconds in [clocks[run.seed]]
    ]
    [panel] = _cost_panels(plan, rows, "knn_top1", "cpu_seconds")
    assert [s.points for s in panel.series] == [[(2, 41)]]


def test_small_differences_look_small():
    def span(least):
        series = [Series(n, [(0, y)], joined=False) for n, y in (("a", 40.0), ("b", 40.1))]
        low, high = chart([Panel("one", series, least=least)], "x", "y").axes[0].get_ylim()
        assert low < 40
        assert high > 40.1
        return high - low

    assert span(0.0) < 0.15
    assert span(2.0) == pytest.approx(2.0)


def test_differences_have_their_place_interval_and_look():
    several, one = (
        paired({"0": 3.0, "1": 4.0}, {"0": 1.0, "1": 1.0}),
        paired({"0": 1.0}, {"0": 2.0}),
    )
    rows = [[Gaps("kNN", [("a", several), ("b", one)]), Gaps("linear", [("a", several)])]]
    axes = differences(rows, "points").axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["a"]
    (first, _, (bar,)), (second, *_) = axes[0].containers
    assert (first.get_xdata(), first.get_ydata()) == ([2.5], [0])
    half = 12.7062 * 0.5  # t of one degree of freedom at 97.5%, standard error of 2 and 3
    assert bar.get_segments()[0][:, 0] == pytest.approx([2.5 - half, 2.5 + half], abs=1e-3)
    assert second.get_xdata() == [-1]
    assert second.get_fillstyle() == "none"
    assert first.get_fillstyle() == "full"


def test_processors_of_one_name_are_told_apart(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel name\t: B\n")
    assert processor(told) == "AMD EPYC (25.17)"
    told.write_text("model name\t: Cortex-A72\n")
    assert processor(told) == "Cortex-A72"
    assert processor(tmp_path / "missing") == (platform.processor() or platform.machine())


class Samix:
    """Stands in for a command's process: leaves at once what the command would leave."""

    fails = ""  # runs whose name holds it
    started: ClassVar[list[str]] = []  # the words of all

    def __init__(self, arguments, stdout, pass_fds, **_):
        [self.lock] = pass_fds
        self.words = dict(word.partition("=")[::2] for word in arguments[3:])
        self.returncode = 1 if self.fails and self.fails in stdout.name else 0
        stdout.write(b"samix: loss became NaN\n" if self.returncode else b"fine\n")
        self.started.append(" ".join(arguments[2:]))
        if not self.returncode:
            (self.measure if "run" in self.words else self.train)()

    def train(self):
        out = Path(self.words["out"])
        out.mkdir(parents=True)
        epochs = [
            {"epoch": i, "step": 4 * i + 4, "seconds": 2, "cpu_seconds": 1 + i, "knn/top1": 40 + i}
            | {"images_per_second": 64, "mixer/mask_std": 0.1}
            for i in range(int(self.words["trainer.max_epochs"]))
        ]
        write_rows(out / "metrics.csv", ("epoch",), epochs)
        (out / "environment.json").write_text('[{"precision": "64"}, {"precision": "bf16-mixed"}]')
        (out / "last.ckpt").touch()

    def measure(self):
        found = {"variant": "heads", "numbers": {"top1": 50.0}, "settings": {}}
        chosen = {"variant": "chosen", "numbers": {"top1": 45.0}, "settings": {"k": 20}}
        chosen["settings"]["temperature"] = 0.07
        k200 = {"variant": "k200-T0.1", "numbers": {"top1": 44.0}, "settings": {}}
        out = Path(self.words["out"])
        out.mkdir(parents=True)
        results = [found] if out.name == "study-linear" else [chosen, k200]
        (out / "results.json").write_text(json.dumps({"results": results}))

    def wait(self):
        return self.returncode

    def poll(self):
        return self.returncode


class Here:
    """Stands in for submitit: what is started is done in this process when it is looked at."""

    def __init__(self, study):
        self.ended = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        Here.ended = True

    def start(self, job):
        return Here.Started(job)

    def outcome(self, started):
        return started.result

    do = Launcher.do

    class Started:
        def __init__(self, job):
            self.job = job

        def done(self):
            self.result = self.job.work()
            return True


@pytest.fixture
def here(monkeypatch):
    """Run a study's jobs in this process, each command being 4 CPU seconds of a stand-in."""
    clock = count(0, 4)
    monkeypatch.setattr(study_jobs, "_cpu_seconds", lambda: next(clock))
    monkeypatch.setattr(study_jobs.subprocess, "Popen", Samix)
    monkeypatch.setattr(Samix, "started", [])
    monkeypatch.setattr(command, "Launcher", Here)
    monkeypatch.setattr(command, "POLL_SECONDS", 0.0)
    # Figures are made, and not encoded, which takes most of the time.
    monkeypatch.setattr(study_pictures, "write_figure", lambda path, figure: path.touch())


def test_every_run_gets_a_row(study, here):
    plan = study(workers=3)
    assert main(["study.yaml"]) == "runs/study.md"
    rows = read_table(plan)
    assert list(rows) == [run.key for run in plan.runs()]
    first = rows[plan.runs()[0].key]
    assert {name: first[name] for name in ("epochs", "steps", "images", "cpu_seconds")} == {
        "epochs": "2", "steps": "8", "images": "256", "cpu_seconds": "4.0"
    }  # fmt: skip
    assert (first["knn_top1"], first["knn_k200_top1"], first["linear_top1"]) == ("45", "44", "50")
    assert (first["cpu_ms_per_step"], first["step_ratio"]) == ("375.00", "1.000")
    assert (first["mask_std"], first["processor"]) == ("0.1", processor())
    assert first["precision"] == "bf16-mixed", "of the last start"
    before, commands = plan.csv.read_bytes(), len(Samix.started)
    assert commands == 3 * len(rows)
    main(["study.yaml"])
    assert len(Samix.started) == commands, "nothing was left to be started"
    assert plan.csv.read_bytes() == before
    assert list_runs(plan).endswith("4 of 4 done")
    paces = {key: {**row, "seconds": "5.0"} for key, row in rows.items()}
    assert seconds_left(paces, [(plan.runs()[0], 4)]) == 10.0


def test_rows_count_without_folders(study, here):
    """A committed table is resumed on another machine."""
    plan = study()
    plan.csv.parent.mkdir()
    write_rows(plan.csv, COLUMNS, [row(run) for run in plan.runs()[1:]])
    main(["study.yaml"])
    assert [path.name for path in plan.out.glob("*-s0")] == ["moco-none-e2-s0"]
    assert len(read_table(plan)) == 4


def test_a_failed_run_is_named_and_the_others_go_on(study, here, monkeypatch, capsys):
    plan = study()
    monkeypatch.setattr(Samix, "fails", "moco-samix")
    with pytest.raises(SystemExit) as caught:
        main(["study.yaml"])
    assert caught.value.code == 1
    shown = capsys.readouterr()
    sentence = "moco-samix-e2-s0 failed: loss became NaN (exit status 1); its log is runs/logs/"
    assert sentence in shown.err
    assert "[3/4] simclr-samix-e2-s0: kNN 45.00%, linear 50.00%, 2 epochs, 4 CPU s; 1 left" in (
        shown.out
    )
    assert len(read_table(plan)) == 3
    monkeypatch.setattr(Samix, "fails", "")
    assert main(["study.yaml"]) == "runs/study.md"
    assert len(read_table(plan)) == 4
    assert "![](study-time.png)" in Path("runs/study.md").read_text()


def test_an_interrupted_study_says_how_to_resume(study, here, monkeypatch):
    study()

    def interrupted(started):
        raise KeyboardInterrupt

    monkeypatch.setattr(Here.Started, "done", interrupted)
    with pytest.raises(Interrupted, match=r"0 of 4 runs done; .* repeat: samix study study\.yaml"):
        main(["study.yaml"])
    assert Here.ended, "the launcher has stopped its jobs"


def test_a_run_that_another_process_has_is_waited_for(study, here, monkeypatch, capsys):
    plan = study(methods={"moco": []})
    plan.logs.mkdir(parents=True)
    first, second = plan.runs()
    monkeypatch.setattr(command, "BUSY_SECONDS", 0.0)
    lock = locked(plan.logs / f"{first.name}.lock")
    assert lock.__enter__() is not None
    assert RunJob(plan, first, 2).work() == "another process works on it"

    def sleep(_):
        if list(read_table(plan)) == [second.key]:
            add_row(plan, row(first))  # the other process has done it
            lock.__exit__(None, None, None)

    monkeypatch.setattr(command.time, "sleep", sleep)
    main(["study.yaml"])
    told = capsys.readouterr().out
    assert told.count("waiting for other processes: moco-none-e2-s0\n") == 1
    assert len(read_table(plan)) == 2
    assert not plan.folder(first).exists()


def test_a_lock_is_held_until_the_last_process_that_has_it_ends(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    with locked(path) as descriptor:
        assert descriptor is None
    child.kill()
    child.wait()
    with locked(path) as descriptor:
        assert descriptor is not None


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text()


def sleeper(plan):
    # A class of a function is pickled with its code: the job need not import this file.
    class Sleeper(Job):
        def work(self):
            Path("begun").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
            try:
                time.sleep(60)
            finally:
                Path("stopped").touch()

    return Sleeper(plan)


@pytest.mark.parametrize("gpus", ["3", None])
def test_jobs_of_this_machine_stop_with_their_study(gpus, study, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if gpus:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with Launcher(study()) as launcher:
        started = launcher.start(sleeper(launcher.study))
        assert wait_for(Path("begun")) == (gpus or "all")
        os.kill(int(started.job_id), signal.SIGINT)  # Ctrl-C is for the study
        time.sleep(0.1)
        assert not started.done()
    assert started.done()
    assert Path("stopped").exists()
    assert not list(Path("runs/logs/jobs").iterdir())


def test_a_job_that_ends_by_itself_is_told_with_the_end_of_its_log(study):
    class Broken(Job):
        def work(self):
            raise RuntimeError("no such luck")

    with Launcher(study()) as launcher:
        outcome = launcher.do(Broken(launcher.study))
    assert outcome.startswith("RuntimeError: no such luck; its log is ")
    assert "Traceback" in Path(outcome.rpartition(" ")[2]).read_text()


STAND_INS = {
    "sbatch": """#!/bin/sh
cp "$1" {here}/submitted
export SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_PROCID=0
# submitit names the job's file after this command has ended; a job that is earlier waits a minute
(sleep 0.5; exec sh "$1") > {here}/printed 2>&1 &
echo Submitted batch job $$
""",
    "srun": """#!/bin/sh
while true; do
    case "$1" in
        --output|--error) shift 2 ;;
        --*) shift ;;
        *) break ;;
    esac
done
exec "$@"
""",
    "sacct": "#!/bin/sh\nprintf 'JobID|State|NodeList\\n1|RUNNING|localhost\\n'\n",
    "scancel": '#!/bin/sh\necho "$@" > {here}/cancelled\n',
    "scontrol": '#!/bin/sh\necho "$@" > {here}/requeued\n',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands: a job is a process of this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(text.replace("{here}", str(tmp_path)))
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_job_of_a_cluster(study, slurm):
    class Where(Job):
        def work(self):
            from ssl_samix.reporting.study_jobs import command_environment

            return os.environ.keys() - command_environment().keys()

    resources = {"timeout_min": 7, "gpus_per_node": 1, "mem_gb": 2, "partition": "gpu"}
    with Launcher(study(launcher="slurm", slurm=resources)) as launcher:
        assert launcher.do(Where(launcher.study)) == {
            "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"
        }  # fmt: skip
        submitted = Path("submitted").read_text().splitlines()
        for option in ("time=7", "gpus-per-node=1", "mem=2GB", "partition=gpu"):
            assert f"#SBATCH --{option}" in submitted
        left = launcher.start(sleeper(launcher.study))
        wait_for(Path("begun"))
    assert wait_for(Path("cancelled")).split() == [left.job_id]
    (Path(os.environ["PATH"].split(os.pathsep)[0]) / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    with (
        Launcher(study(launcher="slurm")) as launcher,
        pytest.raises(UserError, match="sbatch failed: "),
    ):
        launcher.start(sleeper(launcher.study))


def test_a_run_is_queued_again_when_its_time_is_up(study, slurm):
    class Slow(RunJob):
        def work(self):
            self._process = subprocess.Popen(["sleep", "60"])
            Path("begun").write_text(str(os.getpid()))
            self._process.wait()
            Path("ended").touch()

    plan = study(launcher="slurm")
    plan.logs.mkdir(parents=True)
    with Launcher(plan) as launcher:
        started = launcher.start(Slow(plan, plan.runs()[0], 2))
        os.kill(int(wait_for(Path("begun"))), signal.SIGUSR2)
        assert wait_for(Path("requeued")).split() == ["requeue", started.job_id]
        again = started.submission().function
        assert (type(again), again.run, again.epochs) == (RunJob, plan.runs()[0], 2)


def test_a_machine_without_slurm(study, fails, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    study()
    assert "launcher=slurm needs SLURM's sbatch and srun" in fails(
        "study", "study.yaml", "launcher=slurm"
    )


def test_what_was_lost_is_made_up_from_the_epochs(study, here):
    """Killed starts are charged for the epochs that they logged."""
    plan = study()
    plan.logs.mkdir(parents=True)
    job = RunJob(plan, plan.runs()[0], 3)
    assert job.work() is None
    notes = job.notes()
    assert (notes.trained, notes.epochs, len(notes.parts)) == (True, 3, 1)
    notes.parts = [{"before": 0}, {"before": 2, "seconds": 9.0, "cpu_seconds": 7.0}]
    job._write(notes)
    again = RunJob(plan, plan.runs()[0], 99)
    assert again.notes().epochs == 3, "a run that has begun keeps its length"
    assert again.next_words(again.notes()) is None
    assert again.row()["cpu_seconds"] == "10.0"  # epochs of 1 and 2 seconds, and 7
    assert again.row()["seconds"] == "13.0"


def test_notes_of_earlier_versions_and_damaged_ones(study, here):
    plan = study()
    plan.logs.mkdir(parents=True)
    job = RunJob(plan, plan.runs()[0], 2)
    assert job.work() is None
    job.notes_path.write_text('{"epochs": 2, "trained": true, "parts": [{"before": 0}]}')
    assert job.next_words(job.notes()) is None
    assert job.row()["cpu_seconds"] == "3.0"
    job.notes_path.write_text('{"epochs": 2')
    with pytest.raises(UserError, match=r"json is damaged: remove it and the run's folder"):
        job.notes()


def test_the_excerpt_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert log_excerpt(log) == "it printed nothing"
    log.write_text("samix: old\n")
    log.write_text(log.read_text() + "Traceback\nRuntimeError: no\n")
    assert log_excerpt(log) == "old"
    assert log_excerpt(log, len("samix: old\n")) == "RuntimeError: no"


def test_epochs_that_fit_a_budget(study):
    plan = study(length={"cpu_seconds": [1, 240]}, methods={"moco": []})
    costs = Costs(plan)
    assert costs.epochs(plan.runs()[0]) is None
    plan.csv.parent.mkdir()
    known = {"cpu_ms_per_step": 500, "ratio": 1, "steps_per_epoch": 78, "rounds": 5}
    rows = [
        {**dict.fromkeys(COSTS, ""), **known, "method": "moco", "policy": name}
        | {"settings": " ".join(sorted(plan.words("moco", name)))}
        for name in plan.policies
    ]
    write_rows(costs.path, COSTS, rows)
    epochs = {run.name: costs.epochs(run) for run in plan.runs()}
    assert epochs["moco-none-t1-s0"] == 1
    assert epochs["moco-none-t240-s0"] == 6  # 39 seconds each
    costs.measure(pytest.fail, pytest.fail)
    changed = study(length={"cpu_seconds": [240]}, methods={"moco": ["method.queue_size=128"]})
    assert Costs(changed).epochs(changed.runs()[0]) is None, "it was measured with other words"


def test_costs_are_measured_by_turns():
    words = ["data=digits", *TINY, "data.batch_size=8"]
    found = measured("pretrain", [[*words, "mixup=none"], [*words, "mixup=samix"]], rounds=1)
    [[none, samix]] = found["cpu_seconds_per_step"]
    assert none > 0
    assert samix > 0
    assert found["steps_per_epoch"] == [32, 32]
    supervised = measured("supervised", [[*words, "mixup=mixup"]], rounds=1)
    assert supervised["steps_per_epoch"] == [32]


def test_a_killed_study_is_resumed(study):
    """Processes that are really killed: what they left behind ends, and all is done."""
    changed = {"methods": {"simclr": ["method=simclr"]}, "workers": 2, "length": {"epochs": 1}}
    study(**changed, evaluate=[])
    words = [sys.executable, "-m", "ssl_samix", "study", "study.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(words, env=environment, start_new_session=True)
    runs = [Path(f"runs/simclr-{policy}-e1-s0") for policy in ("none", "samix")]
    while not all((run / "config.yaml").exists() for run in runs):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not Path("runs/study.csv").exists()
    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs left, 2 at a time" in again.stdout
    assert re.search(r"\[2/2\] simclr-\w+-e1-s0: 1 epoch, \d+ CPU s", again.stdout)
    with Path("runs/study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["policy"], r["epochs"], r["images"]) for r in rows] == [
        ("none", "1", "256"), ("samix", "1", "256")
    ]  # fmt: skip
    assert all(float(r["cpu_seconds"]) > 0 and float(r["step_ratio"]) > 0 for r in rows)
    assert float(rows[1]["mask_std"]) > 0
    for run in runs:  # the same folders, and a note of both starts
        notes = json.loads(Path(f"runs/logs/{run.name}.json").read_text())
        assert len(notes["parts"]) == 2
    assert "2 of 2 runs." in Path("runs/study.md").read_text()
    assert {p.name for p in Path("runs").glob("*.png")} == {
        f"study-{name}.png" for name in ("epochs", "time")
    }
    # Measured as the study does it, but in this process, which has its imports.
    plan = study(**changed, evaluate=["knn"])
    job = RunJob(plan, plan.runs()[0], 1)
    samix_here(*job.next_words(job.notes()), cwd=".")
    assert job.next_words(job.notes()) is None
    found = job.row()
    assert float(found["knn_top1"]) > 10
    assert float(found["knn_k200_top1"]) > 10
    assert int(found["knn_k"]) in (10, 20, 100, 200)


def test_a_run_is_not_measured_under_words_it_was_not_trained_with(study, here, monkeypatch):
    """Training is done, the study stops before the row, and then the file is changed."""
    only = {"methods": {"moco": []}}

    def interrupted(_):
        raise KeyboardInterrupt

    study(**only, policies={"none": ["mixup=none"]})
    measure = Samix.measure
    monkeypatch.setattr(Samix, "measure", interrupted)
    with pytest.raises(Interrupted):
        main(["study.yaml"])
    monkeypatch.setattr(Samix, "measure", measure)
    changed = study(**only, policies={"none": ["mixup=none", "data.limit=128"]})
    with pytest.raises(SystemExit), redirect_stderr(io.StringIO()) as told:
        main(["study.yaml"])
    assert (
        "moco-none-e2-s0 failed: runs/moco-none-e2-s0 was trained with other words "
        "(data.limit=128 data.limit=256): rename what was changed, or remove the folder"
    ) in told.getvalue()
    assert read_table(changed) == {}
    same = study(**only, policies={"none": ["mixup=none"]})
    main(["study.yaml"])
    assert len(read_table(same)) == 1
    assert sum("pretrain" in words for words in Samix.started) == 1


def test_a_window_of_mixing_costs_its_share(monkeypatch):
    words = ["data=digits", *TINY, "mixup=samix", "mixup.during=[0.9,1]"]

    def stub(candidate):
        candidate.steps_per_epoch = 8
        return 5.0 if candidate.module.mixing.mixes_in(range(8), 8) else 1.0

    monkeypatch.setattr(Candidate, "_mean_of_few", stub)
    found = measured("pretrain", [words, words[:-1]], rounds=1)
    assert found["cpu_seconds_per_step"] == [[pytest.approx(1.4), 5.0]]


def test_clusters_cost_what_a_run_pays_for_them(monkeypatch):
    words = ["data=digits", *TINY, "data.batch_size=8", "mixup=samix_c", "mixup.clusters=4"]
    cluster, hour = _Clustering.on_train_epoch_start, 3600.0

    def slow(callback, *given):
        cluster(callback, *given)
        callback.cpu_seconds += hour

    monkeypatch.setattr(_Clustering, "on_train_epoch_start", slow)
    [[cost]] = measured("pretrain", [[*words, "mixup.cluster_every=10"]], 1)["cpu_seconds_per_step"]
    assert 0 < cost - hour / (10 * 32) < 5  # the rest: a tiny step, on any processor
