"""``samix report``: one HTML file of runs, which opens without a network and runs nothing else."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

import ssl_samix
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import compose, dotted, plain
from ssl_samix.reporting import report, report_plots
from tests.conftest import samix_here
from tests.test_hostile_folders import TOP1

EVIL = "</script><img src=x onerror=window.witness=1><script>window.witness=1</script>"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.held = [], "", {}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] == "script":
            self.held.setdefault(self.tags[-1][1].get("id"), data)

    def plots(self):
        return json.loads(self.held["plots"])


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A run and photographs whose names are scripts, a copy and an odd one among them."""
    folder = tmp_path_factory.mktemp("reported")
    run = trained("moco samix", folder / "run <img src=x onerror=window.witness=1>")
    photos = folder / "photos"
    generator = np.random.default_rng(0)
    for i in range(12):
        path = photos / f"{i:02}{EVIL}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(100, 156, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    shutil.copy(photos / f"03{EVIL}.png", photos / "copy.png")
    Image.new("RGB", (8, 8), "red").save(photos / "odd.png")
    row = {**TOP1, "top1": "87.65", "variant": EVIL}
    (run / "results.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())))
    environment = json.loads((run / "environment.json").read_text())
    environment[-1]["system"] = EVIL
    (run / "environment.json").write_text(json.dumps(environment))
    return ssl_samix.report(run, images=photos, device="cpu", workers=0)


def test_the_page_has_all_parts_and_names_are_text(reported):
    page = Page(reported)
    assert reported.name == "report.html"
    assert reported.stat().st_size < 2e6
    for text in ("87.65", EVIL, "samix pretrain method=moco", "1 of 1", "data.crop_min"):
        assert text in page.text
    assert [tag for tag, _ in page.tags].count("script") == 3
    policy = next(a["content"] for t, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert all(a["nonce"] in policy for t, a in page.tags if t == "script")
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert all(picture["src"].startswith("data:image/") for picture in pictures)
    assert [p["alt"] for p in pictures if p["alt"]] == ["Mixtures", "Views"]
    assert not {name for _, a in page.tags for name in a if name.startswith("on")}
    assert not [t for t, a in page.tags if "src" in a and t != "img"]
    assert [*page.plots()][-1] == "map0"
    drawn = json.dumps(page.plots()["map0"])
    assert drawn.count("data:image/jpeg") == 14
    assert "t-SNE x" in drawn


def test_copies_and_the_odd_one_are_shown(reported):
    figures = [a["title"] for tag, a in Page(reported).tags if tag == "figure"]
    isolated, alike = figures[8 * 10 : 8 * 10 + 14], figures[8 * 10 + 14 :]
    assert isolated[0] == "odd.png"
    assert {*alike[:2]} == {f"03{EVIL}.png", "copy.png"}


def test_the_command_that_repeats_a_run_composes_its_configuration(trained, tmp_path):
    run = RunFolder(trained("moco samix", tmp_path / "run"))
    samix, command, *words = shlex.split(report.repeating(run))
    assert (samix, command) == ("samix", "pretrain")
    config, choices = run.load_config()
    again, same = compose("pretrain", words)
    assert same == choices
    before, now = dotted(plain(config)), dotted(plain(again))
    differ = {key for key in before if before[key] != now[key]}
    assert differ == {*run.automatic(), "out"}


def test_several_runs_share_curves_and_have_a_map_each(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (trained("moco none", tmp_path / name / "run") for name in "ab")
    # The encoder's own file is missing in one, and the images of the other.
    (b / "encoder.safetensors").unlink()
    (b / "last.ckpt").unlink()
    printed = samix_here("report", a, b, "points=20", "device=cpu", cwd=tmp_path)
    assert printed.splitlines()[-1] == "report.html"
    page = Page(tmp_path / "report.html")
    assert "the run has no encoder yet" in page.text
    assert [name for name in page.plots() if name.startswith("map")] == ["map0"]
    assert json.dumps(page.plots()["map0"]).count("data:image/jpeg") == 10
    loss = json.dumps(page.plots()["curve0"])
    assert f"{a}: loss" in loss or str(a) in loss
    assert str(b) in loss


def test_a_report_at_the_end_of_a_run(tmp_path, capsys):
    settings = {"data.limit": 40, "data.batch_size": 20, "backbone.width": 8}
    settings |= {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "data.workers": 0}
    run = ssl_samix.pretrain("digits", out=tmp_path / "run", mixup="none", report=True, **settings)
    assert "40 of 40 images" in Page(run.out / "report.html").text
    assert yaml.safe_load((run.out / "config.yaml").read_text())["report"] is True
    assert capsys.readouterr().out.splitlines()[-1] == str(run.out / "report.html")


def test_maps_keep_neighbours_together():
    generator = np.random.default_rng(0)
    group = np.repeat(np.eye(3, 8), 20, axis=0)
    features = (group + generator.normal(0, 0.05, group.shape)).astype(np.float32)
    for places in report_plots.projections(features, seed=0).values():
        assert places.shape == (60, 2)
        apart = np.linalg.norm(places[:, None] - places, axis=-1)
        np.fill_diagonal(apart, np.inf)
        assert (apart.argmin(axis=1) // 20 == np.arange(60) // 20).all()
    two = report_plots.projections(features[[0, 30]], seed=0)
    assert two["PCA"].shape == (2, 2)
    assert "t-SNE" not in two


def test_thumbnails_are_bounded_and_never_enlarged(monkeypatch):
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(256, size=(500, 700, 3), dtype=np.uint8))
    point, tile = (len(report.thumbnail(noise, (s, s))) for s in (report.POINT, report.TILE))
    tiles = report.ASKED * (1 + report.NEIGHBOURS) + report.ISOLATED + 2 * report.ALIKE
    most = report.MOST_POINTS * point + tiles * tile
    assert most < 0.7 * report.MOST_MB * 1e6, "of images of noise, the largest there are"
    small = Image.new("RGB", (8, 8))
    assert report.thumbnail(small, (48, 48)) == report.thumbnail(small, (96, 96))


def test_a_file_that_would_be_too_large_is_not_written(trained, tmp_path, fails, monkeypatch):
    run = trained("moco none", tmp_path / "run")
    monkeypatch.setattr(report, "MOST_MB", 1)
    sentence = fails("report", run, "points=10", "device=cpu")
    assert re.search(r"would have \d MB, and 1 are the most: give fewer runs", sentence)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "report needs runs: samix report run=<run folder>"),
        (["nowhere"], "nowhere is not a run folder"),
        (["run={run}", "point=5"], "unknown key 'point': did you mean 'points'"),
        (["run={run}", "points=5"], "points must be a number in [10, 5000]"),
        (["run={run}", "points=many"], "points needs a whole number"),
        (["run={run}", "images=nowhere"], "images=nowhere is not a folder"),
        (["run={run}", "out=mine.html"], "out=mine.html is not a report of samix"),
        (["run={run}", "out=no/report.html"], "out=no/report.html: there is no folder no"),
        (["run={run}", "out=."], "out=. is a folder"),
        (["--runs"], "unknown key '--runs'"),
        ([*"abcdefghi"], "a report shows at most 8 runs, not 9"),
    ],
)
def test_mistakes(words, sentence, reported, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    assert sentence in fails("report", *(word.format(run=reported.parent) for word in words))
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_a_missing_package_is_told_before_heavy_imports(reported, fails, monkeypatch):
    code = (
        "import sys\nsys.modules['bokeh'] = None\nfrom ssl_samix.reporting.report import main\n"
        f"try:\n    main(['run={reported.parent}'])\n"
        "except ValueError as error:\n    print({'torch', 'numpy'} & {*sys.modules}, error)\n"
    )
    monkeypatch.setattr("ssl_samix.config.extras._installed", lambda name: name != "bokeh")
    for words in (["report", reported.parent], ["pretrain", "report=true"]):
        assert "needs bokeh: pip install 'ssl_samix[report]'" in fails(*words)
    shown = subprocess.run(
        [sys.executable, "-c", code.replace("sys.modules['bokeh'] = None\n", "")
         .replace("main([", "main(['points=1', ")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.startswith("set() points must be a number")


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1366,900", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


# Resolves when all plots are drawn.
DRAWN = """
const done = arguments[0], wanted = document.querySelectorAll("div[id^=curve], div[id^=map]").length
const types = () => [...Bokeh.index.roots].map(view => view.model.type)
const drawn = () => types().filter(type => type !== "Notifications").length
const look = () => drawn() === wanted ? done(wanted) : setTimeout(look, 100)
look()"""
# Returns where the image of some row is on the page, by the first map.
PLACE = """
const root = [...Bokeh.index.roots].find(view => view.model.type.endsWith("Row"))
root.el.scrollIntoView({block: "center"})
const plot = root.child_views[0], source = plot.model.renderers[0].data_source
const box = plot.el.getBoundingClientRect(), row = arguments[0]
return [box.x + plot.frame.x_scale.compute(source.get_column("PCA x")[row]),
        box.y + plot.frame.y_scale.compute(source.get_column("PCA y")[row]),
        source.get_column("id")[row]]"""
# Returns text and loaded images of the tooltips, which are in shadow trees.
TIPS = """
const all = node => [node, ...[...(node.shadowRoot?.children ?? []), ...node.children].flatMap(all)]
const tips = all(document.body).filter(node => node.classList?.contains("bk-Tooltip"))
const inside = tips.flatMap(all)
return [inside.filter(n => n.tagName === "DIV" && !n.children.length).map(n => n.textContent),
        inside.filter(n => n.tagName === "IMG").map(n => [n.src.slice(0, 22), n.naturalWidth])]"""


@pytest.mark.slow
def test_in_a_browser_it_draws_shows_thumbnails_and_fetches_nothing(reported, browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(reported.as_uri())
    assert browser.execute_async_script(DRAWN) >= 6
    for row in (0, 5, 13):
        x, y, name = browser.execute_script(PLACE, row)
        pointer = ActionChains(browser, duration=50)
        pointer.w3c_actions.pointer_action.move_to_location(round(x) + 30, round(y))
        pointer.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        pointer.perform()
        WebDriverWait(browser, 10).until(lambda b, n=name: n in b.execute_script(TIPS)[0])
        _, pictures = browser.execute_script(TIPS)
        assert ["data:image/jpeg;base64", 8] in pictures
    assert browser.execute_script("return window.witness") is None
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    wide = "return document.documentElement.scrollWidth - window.innerWidth"
    assert browser.execute_script(wide) <= 0
    errors = [e for e in browser.get_log("browser") if e["level"] not in ("INFO", "DEBUG")]
    assert errors == []
    said = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        e["params"]["request"]["url"] for e in said if e["method"] == "Network.requestWillBeSent"
    ]
    ours = [url for url in asked if not url.startswith(("data:", "chrome", "blob:"))]
    assert ours == [reported.as_uri()]
