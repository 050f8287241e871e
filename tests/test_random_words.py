"""Whatever is typed after a key: the command works, or tells in one sentence why it does not.

``SAMIX_EXAMPLES=2000`` tries as many lines of each command instead of a few.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssl_samix.artifacts.export import Exported
from ssl_samix.cli.commands import SUBCOMMANDS, PlainSubcommand, load_protocol
from ssl_samix.cli.main import main
from ssl_samix.config.compose import compose, groups, keys_of
from ssl_samix.training import run as fitting
from ssl_samix.training.logging import Run

OLD = Path(__file__).parent / "old_run"
EXAMPLES = int(os.environ.get("SAMIX_EXAMPLES", "8"))
# Each with words that make it a whole command; random ones follow. "run" is a copy of OLD.
TINY = ["data.batch_size=8", "backbone.name=resnet10", "backbone.width=4", "out=new"]
COMMANDS = {
    "pretrain": TINY,
    "supervised": [*TINY, "mixup=none"],
    "show-mixing": ["run=run", "out=a.png"],
    "linear": ["run=run", "data=digits"],
    "knn": ["run=run", "data=digits"],
    "semi": ["run=run", "data=digits"],
    "measures": ["run=run", "data=digits"],
    "robustness": ["run=run", "data=digits"],
    "embed": ["run=run"],
    "export": ["run=run", "format=timm", "out=a.pth"],
}
# What would load from the network, or build networks of minutes.
LEFT = {"backbone", "experiment", "data.download", "weights", "_target_", "_partial_"}
TEXTS = st.text(st.characters(exclude_characters="\0/:", exclude_categories=["Cs"]), max_size=8)
ODD = (
    "", "null", "true", "False", "???", "~", "~no-such-user/x", ".", "..", "auto", "-", "a=b",
    "${seed}", "${oops}", "${data}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${", "${now:}",
    "${hydra:job}", "${.seed}", "'", '"', "'a", "\\", "[", "]", "{", "}", "a b", " ", ",", "-0.0",
    "1,2", "range(1,3)", "choice(1,2)", "sort(1)", "glob(*)", "1_0", "0x1", "nan", "+inf",
    "run", "no/such/file", "run/last.ckpt", "run/config.yaml", "x" * 300, "\u00e9" * 200,
)  # fmt: skip
SCALARS = st.one_of(
    st.integers(-3, 70).map(str),
    st.sampled_from([str(2**31), str(-(2**63)), str(10**30), "9" * 5000, "1e308", "1e-308"]),
    st.floats().map(str),
    st.sampled_from(ODD),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
        st.dictionaries(st.sampled_from(["a", "k", "1", "null"]), inner, max_size=2).map(
            lambda parts: "{" + ",".join(f"{k}:{v}" for k, v in parts.items()) + "}"
        ),
    ),
    max_leaves=4,
)


@cache
def keys_for(command: str) -> list[str]:
    entry = SUBCOMMANDS[command]
    assert not isinstance(entry, PlainSubcommand)
    data = ["data=digits"] if "data" in groups(entry.config) else []
    keys = {*keys_of(compose(entry.config, data)[0]), *groups(entry.config)}
    return sorted(k for k in keys if k not in LEFT and k.rpartition(".")[2] not in LEFT)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder to type in, where nothing is trained or measured, though all of it is built."""
    folder = tmp_path_factory.mktemp("typed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        for name in ("_fit", "announce"):
            patch.setattr(fitting, name, lambda *given: None)
        patch.setattr(fitting, "finish", lambda trainer, run, monitor: Run(run.path, {}))
        patch.setattr(fitting.Mode, "save", lambda *given: None)
        for name in ("linear", "knn", "semi_supervised", "measures", "robustness"):
            patch.setattr(load_protocol(name), "run", lambda request: None)
        patch.setattr("ssl_samix.training.supervised.save_classifier", lambda *given: None)
        patch.setattr("pytorch_lightning.Trainer.save_checkpoint", lambda *given: None)
        patch.setattr("ssl_samix.cli.show_mixing.show", lambda request: None)
        patch.setattr("ssl_samix.evaluation.embed.embed", lambda request: None)
        patch.setattr(
            "ssl_samix.artifacts.export.export", lambda request: Exported(request.out, "")
        )
        shutil.copytree(OLD, folder / "run")
        yield folder


def said(words):
    """Run a command here and return its exit status and what it prints as errors."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.argv = before
    return status, err.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_that_others_follow_are_right(command, workplace):
    status, error = said([command, *COMMANDS[command]])
    assert (status, error.strip()) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_random_words(command, workplace):
    words = st.lists(
        st.builds("{}={}".format, st.sampled_from(keys_for(command)), VALUES),
        min_size=1,
        max_size=2,
    )

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(words)
    def check(typed):
        shutil.rmtree(workplace / "new", ignore_errors=True)
        status, error = said([command, *COMMANDS[command], *typed])
        assert status in (0, 2), error
        assert "Traceback" not in error
        sentences = [line for line in error.splitlines() if line.startswith("samix: ")]
        assert len(sentences) == (status == 2), error

    check()
