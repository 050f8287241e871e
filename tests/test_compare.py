"""``samix compare``: hand-made results of several runs, and the table that they must give."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from functools import cache
from itertools import count

import pytest

from ssl_samix.artifacts.results import append_rows, read_rows
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.cli.main import main as samix
from ssl_samix.config.compose import compose
from ssl_samix.reporting.compare import main
from ssl_samix.reporting.tables import Table, latex, markdown, text

BASE = {
    "time": "2026-01-01 00:00:00 +0000", "protocol": "knn", "variant": "chosen", "weights": "own",
    "data": "digits", "test_images": 359, "seed": 0, "data_fingerprint": "d", "settings": "{}",
}  # fmt: skip
_numbers = count()


@cache
def composed(*words):
    """Compose a run of pretraining, or of the command that the first word names."""
    command = words[0] if "supervised" in words else "pretrain"
    given = [word for word in words if word != command]
    moco = [] if command == "supervised" or "method=" in " ".join(given) else ["method=moco"]
    return compose(command, [*moco, *given])


@pytest.fixture
def run(tmp_path):
    """Make a run folder with the results of evaluations, each a list of rows."""

    def make(name, words=(), *evaluations):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        if words is not None:
            RunFolder(folder).create(*composed(*words))
        for rows in evaluations:
            common = {**BASE, "folder": f"results/{next(_numbers)}", "encoder": name}
            append_rows(folder / "results.csv", [{**common, **row} for row in rows])
        return str(folder)

    return make


def lines(table):
    """The cells of a text table's rows, header and notes left out."""
    below = table.split("---\n", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in below.split("\n")]


@pytest.fixture
def five(run):
    """Two configurations, of three and two seeds."""
    top1 = {"samix": [90, 92, 94], "none": [80, 81]}
    return [
        run(f"{mixup}-{i}", [f"mixup={mixup}", f"seed={i}", f"out=runs/{i}"], [{"top1": value}])
        for mixup, values in top1.items()
        for i, value in enumerate(values)
    ]


def test_seeds_are_a_mean_and_a_deviation(five):
    assert main(five) == (
        "                      knn\n"
        "                   chosen\n"
        "                   digits\n"
        "mixup             top-1 %\n"
        "-------  ----------------\n"
        "samix    92.00 ± 2.00 (3)\n"
        "none     80.50 ± 0.71 (2)\n"
        "\n"
        "mean ± standard deviation (number of encoders)"
    )


def test_markdown(five):
    assert main([*five, "format=markdown"]) == (
        "| mixup | knn chosen digits top-1 % |\n"
        "| :--- | ---: |\n"
        "| samix | 92.00 ± 2.00 (3) |\n"
        "| none | 80.50 ± 0.71 (2) |\n"
        "\n"
        "mean ± standard deviation (number of encoders)"
    )


def test_latex(five):
    assert main([*five, "format=latex"]) == (
        "% needs \\usepackage{booktabs}\n"
        "% mean ± standard deviation (number of encoders)\n"
        "\\begin{tabular}{lr}\n"
        "\\toprule\n"
        " & knn \\\\\n"
        " & chosen \\\\\n"
        " & digits \\\\\n"
        "mixup & top-1 \\% \\\\\n"
        "\\midrule\n"
        "samix & 92.00 ± 2.00 (3) \\\\\n"
        "none & 80.50 ± 0.71 (2) \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}"
    )


def test_what_a_format_reserves_is_escaped():
    cells = ["a_b|c", r"50% & #1 {x}\y", "[0.1,*]", "-1.5", "–"]
    table = Table([["k_1"], ["<k>"], ["~"], ["^"], ["$"]], [cells], 3, ["100% _sure_"])
    assert markdown(table).splitlines() == [
        r"| k\_1 | \<k> | \~ | ^ | \$ |",
        "| :--- | :--- | :--- | ---: | ---: |",
        r"| a\_b\|c | 50% & #1 {x}\\y | \[0.1,\*\] | -1.5 | – |",
        "",
        r"100% \_sure\_",
    ]
    head, row = (line for line in latex(table).splitlines() if line.endswith(r" \\"))
    assert head == r"k\_1 & <k> & \textasciitilde  & \textasciicircum  & \$ \\"
    assert row == r"a\_b|c & 50\% \& \#1 \{x\}\textbackslash y & [0.1,*] & $-$1.5 & – \\"
    assert r"{}[0.1,*] & a \\" in latex(Table([["k"], ["n"]], [["[0.1,*]", "a"]], 2))
    broken = Table([["a"]], [["two\nlines"]], 1)
    for written in (text(broken), markdown(broken), latex(broken)):
        assert "two lines" in written


def test_configurations_are_named_by_what_differs(run):
    runs = [
        run("a", ["trainer.max_epochs=10"], [{"top1": 1}]),
        run("b", ["trainer.max_epochs=20"], [{"top1": 2}]),
        run("c", ["method=byol", "trainer.max_epochs=20", "mixup=none"], [{"top1": 3}]),
        run("d", ["mixup.weight=0.5", "trainer.max_epochs=10"], [{"top1": 4}]),
    ]
    table = main(runs)
    names = [line.split()[:4] for line in table.splitlines()[:4]]
    assert names[3] == ["method", "mixup", "mixup.weight", "trainer.max_epochs"]
    assert lines(table) == [
        ["moco", "samix", "1", "10", "1.00"],
        ["moco", "samix", "1", "20", "2.00"],
        ["byol", "none", "–", "20", "3.00"],
        ["moco", "samix", "0.5", "10", "4.00"],
    ]


def test_classifiers_stand_beside_encoders(run):
    measured = [{"protocol": "robustness", "variant": "online", "top1": 70, "ece": 14.5}]
    measured[0]["fgsm_top1"] = 6.2
    runs = [
        run("a", ["mixup=none"], [{"top1": 1}]),
        run("b", ["supervised", "mixup=none"], measured),
        run("c", ["supervised", "mixup=cutmix"], measured),
    ]
    assert main(runs).splitlines()[3].split() == [
        "method", "mixup", "top-1", "%", "top-1", "%", "ECE", "%", "FGSM", "top-1", "%",
    ]  # fmt: skip
    assert lines(main(runs)) == [
        ["moco", "none", "1.00", "–", "–", "–"],
        ["supervised", "none", "–", "70.00", "14.50", "6.20"],
        ["supervised", "cutmix", "–", "70.00", "14.50", "6.20"],
    ]


def test_what_changes_nothing_makes_no_difference(run):
    words = [
        ["seed=1", "out=x", "data.root=/elsewhere", "data.workers=2", "trainer.precision=32"],
        ["seed=2", "resume=x", "trainer.devices=2", "callbacks.knn.every_n_epochs=1"],
        ["seed=3", "mixup.weight=1", "mixup.alpha=2"],  # 1.0 and 2.0, written as whole numbers
    ]
    runs = [run(f"{i}", w, [{"top1": 10 * i}]) for i, w in enumerate(words)]
    assert lines(main(runs)) == [["moco", "samix", "10.00 ± 10.00 (3)"]]


def test_untrained_networks_are_lines_of_their_own(run):
    both = [{"top1": 90.0, "encoder": "e"}], [{"top1": 50.0, "encoder": "u", "weights": "random"}]
    again = [{"top1": 54.0, "encoder": "v", "weights": "random", "seed": 1}]
    runs = [
        run("a", [], *both, again),
        run("b", ["method=byol"], [{"top1": 80.0}], both[1]),
        run("c", ["backbone.width=8"], [{"top1": 70.0}], [{"top1": 40.0, "weights": "random"}]),
    ]
    assert lines(main(runs)) == [
        ["trained", "moco", "16", "90.00"],
        ["trained", "byol", "16", "80.00"],
        ["trained", "moco", "8", "70.00"],
        # The same untrained network, measured beside two runs, counts once.
        ["untrained", "–", "16", "52.00 ± 2.83 (2)"],
        ["untrained", "–", "8", "40.00"],
    ]


def test_weights_from_elsewhere_are_named_by_their_folder(run):
    runs = [
        run("mine", [], [{"top1": 90.0}]),
        run("resnet50", None, [{"top1": 75.0, "weights": "pretrained"}],
            [{"top1": 20.0, "weights": "random", "encoder": "r"}]),
    ]  # fmt: skip
    assert lines(main(runs)) == [
        ["trained", "moco", "samix", "90.00"],
        ["resnet50 (pretrained)", "–", "–", "75.00"],
        ["resnet50 (untrained)", "–", "–", "20.00"],
    ]


def test_the_newest_numbers_of_a_run_count(run):
    old, new = [{"top1": 10.0, "encoder": "old"}], [{"top1": 60.0, "encoder": "new"}]
    stale = [{"top1": 12.0, "encoder": "old", "seed": 1}]
    again = [{"top1": 70.0, "encoder": "new"}]
    assert lines(main([run("a", [], old, stale, new, again)])) == [["moco", "samix", "70.00"]]


def test_seeds_of_an_evaluation_are_averaged_before_runs_are_counted(run):
    first = [[{"top1": value, "seed": i}] for i, value in enumerate((70.0, 80.0, 90.0))]
    runs = [run("a", ["seed=0"], *first), run("b", ["seed=1"], [{"top1": 84.0}])]
    assert lines(main(runs)) == [["moco", "samix", "82.00 ± 2.83 (2)"]]  # of 80 and 84


def test_a_copied_run_counts_once(run, tmp_path):
    first = run("a", [], [{"top1": 70.0}])
    shutil.copytree(first, tmp_path / "copy")
    assert lines(main([first, str(tmp_path / "copy")])) == [["moco", "samix", "70.00"]]


def test_columns_are_the_first_rows_of_each_number(run):
    knn = [{"variant": v, "top1": 90 + i, "top5": 99} for i, v in enumerate(("chosen", "k10-T0.1"))]
    measures = [
        {"protocol": "measures", "variant": "features", "rankme": 42.25, "uniformity": -1.5},
        {"protocol": "measures", "variant": "k-means", "nmi": 0.5, "cluster_accuracy": 61.0},
    ]
    other = [{"top1": 33.0, "data": "folder"}]
    runs = [run("a", [], knn, measures, other), run("b", ["seed=1"], knn)]
    assert main([*runs, "format=markdown"]).splitlines() == [
        "| method | mixup | knn chosen digits top-1 % | knn chosen folder top-1 % "
        "| measures features digits RankMe | measures features digits uniformity "
        "| measures k-means digits NMI | measures k-means digits cluster accuracy % |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| moco | samix | 90.00 ± 0.00 (2) | 33.00 | 42.2 | -1.500 | 0.500 | 61.00 |",
        "",
        "mean ± standard deviation (number of encoders)",
    ]
    every = main([*runs, "format=markdown", "variants=all"])
    assert "| knn chosen digits top-1 % | knn k10-T0.1 digits top-1 % |" in every
    assert "| 90.00 ± 0.00 (2) | 91.00 ± 0.00 (2) |" in every


def test_other_images_are_told(run):
    one = [{"top1": 1.0, "data_fingerprint": "x"}]
    two = [{"top1": 2.0, "data_fingerprint": "y"}]
    sentence = "not all measured on the same images at the same size: knn chosen digits"
    assert sentence in main([run("a", [], one), run("b", ["seed=1"], two)])
    assert "not all" not in main([run("c", [], one), run("d", ["seed=1"], one)])


def test_a_folder_of_runs_stands_for_them(five, run, tmp_path):
    run("unmeasured", ["seed=9"])
    (tmp_path / "runs" / "notes.txt").write_text("hello")
    (tmp_path / "runs" / "pictures").mkdir()
    runs = str(tmp_path / "runs")
    table = main([runs])
    assert sorted(lines(table)) == [["none", "80.50 ± 0.71 (2)"], ["samix", "92.00 ± 2.00 (3)"]]
    assert table.splitlines()[-1] == f"not measured yet: {runs}/unmeasured"
    assert main([runs, f"{runs}/../runs"]) == table
    as_a_shell_gives_them = [*five, f"{runs}/notes.txt", five[0], f"{five[0]}/../samix-0"]
    assert main(as_a_shell_gives_them) == main(five)


def test_a_run_that_has_not_been_measured_has_blanks(run):
    measured = run("measured", ["mixup=none"], [{"top1": 80.0}])
    bare = run("bare", ["mixup=cutmix"])
    table = main([measured, bare])
    assert lines(table) == [["none", "80.00"], ["cutmix", "–"]]
    assert table.splitlines()[-1] == f"not measured yet: {bare}"
    for shape in ("text", "markdown", "latex"):
        assert "cutmix" in main([bare, f"format={shape}"])
    assert lines(main([bare])) == [["moco", "cutmix"]]


def test_a_file_takes_the_table(five, tmp_path):
    out = tmp_path / "table.md"
    assert main([*five, "format=markdown", f"out={out}"]) == str(out)
    assert out.read_text() == main([*five, "format=markdown"]) + "\n"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_help_and_the_command(five, capsys):
    assert main(["--help"]).startswith("samix compare: the results of several runs as one table.")
    samix(["compare", *five])
    assert capsys.readouterr().out == main(five) + "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "compare needs runs: samix compare <run folder>..."),
        (["nowhere"], "nowhere does not exist: give run folders"),
        (["{good}", "nowhere"], "nowhere does not exist"),
        (["empty"], "empty holds neither a run nor a results.csv"),
        (["notes.txt"], "notes.txt is not a folder"),
        (["{good}", "formt=latex"], "unknown key 'formt': did you mean 'format'"),
        (["{good}", "format=html"], "unknown format 'html': choose from latex, markdown, text"),
        (["{good}", "variants=some"], "unknown variants 'some': choose from all, headline"),
        (["{good}", "--multirun"], "unknown key '--multirun'"),
        (["{good}", "out=no/such/folder/a.md"], "cannot write no/such/folder/a.md"),
        (["{other}"], "results.csv is damaged or not a table of results: it lacks protocol"),
        (["{number}"], "results.csv is damaged: top1 is not a number, 'high'"),
        (["{rowless}"], "results.csv is empty: measure the run first"),
        (["{config}"], "config.yaml is damaged"),
    ],
)
def test_mistakes(words, sentence, run, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    runs = {
        "good": run("good", [], [{"top1": 1.0}]),
        "other": run("other", []),
        "number": run("number", [], [{"top1": "high"}]),
        "rowless": run("rowless", [], []),
        "config": run("config", None, [{"top1": 1.0}]),
    }
    (tmp_path / "runs" / "other" / "results.csv").write_text("name,value\na,1\n")
    (tmp_path / "runs" / "config" / "config.yaml").write_text("- [")
    assert sentence in fails("compare", *(word.format(**runs) for word in words))


def test_a_folder_may_have_an_equals_sign(run):
    folder = run("lr=0.1", [], [{"top1": 5.0}])
    assert lines(main([folder])) == [["moco", "samix", "5.00"]]


def test_it_needs_no_torch_and_pandas_for_tables_alone(five):
    code = (
        "import sys\nfrom ssl_samix.reporting.compare import main\n"
        "try:\n    main(['nowhere'])\nexcept ValueError:\n    print('pandas' in sys.modules)\n"
        f"main({five!r})\nprint('torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\nFalse False\n"


def append_many(path, name):
    for i in range(20):
        append_rows(path, [{"protocol": name, "top1": i}])


def test_evaluations_that_end_together_lose_no_row(tmp_path):
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "results.csv"
    writers = [context.Process(target=append_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [(row["protocol"], int(row["top1"])) for row in read_rows(path)]
    assert sorted(found) == [(name, i) for name in "ab" for i in range(20)]


def test_one_encoder_on_two_folders_has_two_columns(run):
    """Not the newest of both in one."""
    here = [{"top1": 90.0, "data": "folder", "data_fingerprint": "aaaaaaaaaaaa"}]
    there = [{"top1": 50.0, "data": "folder", "data_fingerprint": "bbbbbbbbbbbb"}]
    table = main([run("one", [], here, there)])
    assert "folder aaaaaa" in table
    assert "folder bbbbbb" in table
    assert lines(table)[0][-2:] == ["90.00", "50.00"]
    assert "data_fingerprint of results.csv" in table
