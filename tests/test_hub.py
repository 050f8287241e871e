"""Runs on the Hugging Face hub, against a stand-in of its HTTP interface."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

import ssl_samix
from ssl_samix.artifacts.encoder import load_encoder
from ssl_samix.artifacts.hub import _fetched
from ssl_samix.artifacts.model_card import command_line, escaped
from ssl_samix.artifacts.push import parse_push, push, without_paths
from ssl_samix.artifacts.results import append_rows
from ssl_samix.artifacts.run_folder import RunFolder
from ssl_samix.config.compose import compose, dotted, plain
from ssl_samix.errors import CheckpointError, ConfigError, UserError
from tests.conftest import samix, samix_here
from tests.export.conftest import saved
from tests.test_hostile_folders import TOP1
from tests.test_old_runs import OLD

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """What push and download need of the hub: repositories of files, in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.private, self.asked = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.repos[repo][value["path"]]

    def sha(self, repo):
        told = {name: hashlib.sha1(c).hexdigest() for name, c in sorted(self.repos[repo].items())}
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def say(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def place(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts
        return "/".join(parts[:2]), parts[2:]

    def do_GET(self):
        hub, (repo, rest) = self.server, self.place()
        hub.asked.append((self.command, self.path))
        token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in hub.repos or (hub.private.get(repo) and not token):
            return self.say({"error": "no"}, 404, X_Error_Code="RepoNotFound")
        files, sha = hub.repos[repo], hub.sha(repo)
        if rest[:1] == ["resolve"]:
            content = files.get("/".join(rest[2:]))
            if content is None:
                return self.say(b"", 404, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.say(content, ETag=etag, X_Repo_Commit=sha)
        if rest[:1] == ["tree"]:
            return self.say(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
            )
        if rest[:1] == ["revision"] and rest[1] not in ("main", sha):
            return self.say({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        names = [{"rfilename": name} for name in files]
        private = hub.private.get(repo, False)
        return self.say({"id": repo, "sha": sha, "private": private, "siblings": names})

    do_HEAD = do_GET  # noqa: N815 - the server's name

    def do_POST(self):
        hub, (repo, rest) = self.server, self.place()
        hub.asked.append((self.command, self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---\n")[1]
            if yaml.safe_load(head).get("license") == "unheard-of":
                return self.say({"errors": [{"message": '"license" must be one of'}]}, 400)
            return self.say({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say({"error": "Invalid token"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repos[name] = {".gitattributes": b""}
            hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self.say({"url": f"{hub.url}/{name}"})
        if rest[0] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.say({"files": [{"path": name, **how} for name in names]})
        hub.commit(repo, map(json.loads, body.splitlines()))
        sha = hub.sha(repo)
        return self.say({"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and huggingface_hub with an empty cache and a token that know of no other."""
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    _fetched.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """A finished run, which has been measured."""
    folder = shutil.copytree(OLD, tmp_path / "run")
    append_rows(folder / "results.csv", [TOP1])
    return folder


def pushed(run, *more):
    return push(parse_push([f"run='{run}'", "repo=ada/digits", *more]))


def features(encoder):
    with torch.no_grad():
        size = encoder.image_size
        return encoder(torch.linspace(-2, 2, 3 * size * size).view(1, 3, size, size).sin())


def test_a_run_comes_back_as_it_was_sent(hub, run, capsys):
    assert pushed(run) == "hf://ada/digits"
    sent = hub.repos["ada/digits"]
    assert {*sent} == {
        ".gitattributes", "README.md", "config.yaml", "encoder.safetensors", "mixer.safetensors",
        "model.safetensors",
    }  # fmt: skip
    assert f"sending to {hub.url}/ada/digits (public): README.md, config.yaml" in (
        capsys.readouterr().err
    )
    encoder = ssl_samix.load_encoder("hf://ada/digits")
    assert torch.equal(features(encoder), features(load_encoder(run)))
    assert ssl_samix.load_mixer("hf://ada/digits").stage == 3
    with pytest.raises(UserError, match="hf://ada/digits@old: the repository has no such rev"):
        ssl_samix.load_encoder("hf://ada/digits@old")
    fetched = {Path(path).name for method, path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.yaml", "encoder.safetensors", "mixer.safetensors"}


def test_commands_take_an_address_and_write_beside_no_cache(hub, run, tmp_path, capsys):
    pushed(run)
    printed = samix_here("knn", "run=hf://ada/digits", "k=[5]", "data.limit=64", cwd=tmp_path)
    assert "runs/ada-digits/results/knn-digits-" in printed
    samix_here("export", "run=hf://ada/digits", "format=torchvision", cwd=tmp_path)
    assert (tmp_path / "ada-digits.pth").exists()
    samix_here("show-mixing", "run=hf://ada/digits", "rows=2", cwd=tmp_path)
    assert (tmp_path / "ada-digits-mixing.png").exists()
    names = {p.name for p in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert names == {"config.yaml", "encoder.safetensors", "mixer.safetensors"}


def test_without_a_network_the_copy_is_used(hub, run, monkeypatch):
    pushed(run)
    before = features(ssl_samix.load_encoder("hf://ada/digits"))
    asked = len(hub.asked)
    assert torch.equal(features(ssl_samix.load_encoder("hf://ada/digits")), before)
    assert len(hub.asked) == asked, "the hub is asked once in a process"
    _fetched.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(features(ssl_samix.load_encoder("hf://ada/digits")), before)
    assert len(hub.asked) == asked
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and there is no copy here"):
        ssl_samix.load_encoder("hf://ada/other")


def test_without_either_it_is_one_sentence(hub, run, fails, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    sentence = fails("knn", "run=hf://ada/digits")
    assert "cannot use hf://ada/digits: http://127.0.0.1:9 cannot be reached" in sentence
    assert "cannot use hf://ada/d" in fails("push", f"run={run}", "repo=ada/d")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["repo=ada/x"], "push needs a run of this machine"),
        (["run=hf://ada/x", "repo=ada/x"], "push needs a run of this machine"),
        (["run=run"], "push needs the name of a repository: repo=<user>/<name>"),
        (["run=run", "repo=ada"], "push needs the name of a repository"),
        (["run=run", "repo=a/b", "license='a\nb'"], "is not a name such as mit"),
        (["run=run", "repo=a/b", "private=yes please"], "private needs true or false"),
        (["run=nowhere", "repo=a/b"], "nowhere is not a run folder"),
    ],
)
def test_mistakes_are_told_and_nothing_is_sent(words, sentence, hub, run, fails):
    assert sentence in fails("push", *words)
    (run / "encoder.safetensors").unlink()
    assert "finish the run first" in fails("push", "run=run", "repo=a/b")
    assert not hub.asked


def test_no_token_a_wrong_one_and_addresses_of_nothing(hub, run, fails, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses hf://a/b (401): log in with 'hf auth login'" in fails(
        "push", "run=run", "repo=a/b"
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "push needs a token: log in" in fails("push", "run=run", "repo=a/b")
    assert not hub.repos
    assert "there is no hf://a/b on" in fails("knn", "run=hf://a/b")
    for address in ("hf://a", "hf://", "hf://a/b@", "hf://a/../b", "hf://a/b/c"):
        assert "is not an address on the hub" in fails("knn", f"run={address}")
    hub.repos["a/b"] = {"pytorch_model.bin": b"code", "last.ckpt": b"code"}
    assert "hf://a/b holds no encoder.safetensors: it is not of samix push" in fails(
        "knn", "run=hf://a/b"
    )
    assert not any("/resolve/" in path for _, path in hub.asked)


def test_a_licence_that_the_hub_does_not_know(hub, run, fails):
    sentence = fails("push", "run=run", "repo=a/b", "license=unheard-of")
    assert "refuses hf://a/b: Invalid metadata in README.md" in sentence
    assert hub.repos == {"a/b": {".gitattributes": b""}}


def test_what_others_have_there_is_left_alone(hub, run):
    hub.repos["ada/digits"] = {"model.gguf": b"mine"}
    with pytest.raises(UserError, match="holds what is not of samix push"):
        pushed(run)
    assert hub.repos["ada/digits"] == {"model.gguf": b"mine"}
    hub.repos["ada/digits"] = {"README.md": b"soon"}
    with pytest.raises(UserError, match="exists and is public"):
        pushed(run, "private=true")
    assert hub.repos["ada/digits"] == {"README.md": b"soon"}


def test_a_private_one_is_read_with_its_token_only(hub, run, monkeypatch):
    pushed(run, "private=true")
    assert hub.private == {"ada/digits": True}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="that you may read: check the name, or log in"):
        ssl_samix.load_encoder("hf://ada/digits")


def test_a_second_push_replaces_the_first(hub, run):
    pushed(run)
    (run / "mixer.safetensors").unlink()
    pushed(run)
    assert "mixer.safetensors" not in hub.repos["ada/digits"]
    assert "encoder.safetensors" in hub.repos["ada/digits"]


@pytest.mark.parametrize("kind", ["standard", "vit", "timm"])
def test_timm_loads_it_by_its_address(kind, hub, run):
    saved(run, kind)
    pushed(run)
    model = timm.create_model("hf-hub:ada/digits", pretrained=True).eval()
    encoder = load_encoder(run)
    torch.testing.assert_close(features_of(model, encoder), features(encoder), rtol=0, atol=1e-5)
    images = timm.data.resolve_model_data_config(model)
    assert (tuple(images["mean"]), tuple(images["std"])) == (encoder.mean, encoder.std)
    assert [*images["input_size"]] == [3, encoder.image_size, encoder.image_size]


def features_of(model, encoder):
    class Same:
        image_size = encoder.image_size
        __call__ = staticmethod(model)

    return features(Same())


@pytest.mark.parametrize("kind", ["narrow", "vit"])
def test_the_card_says_how_to_load_it_without_this_package(kind, hub, run):
    """A narrow ResNet is no single call of timm."""
    saved(run, kind)
    pushed(run)
    assert ("config.json" in hub.repos["ada/digits"]) == (kind == "vit")
    card = hub.repos["ada/digits"]["README.md"].decode()
    ours, theirs = (block.partition("```")[0] for block in card.split("```python\n")[1:])
    Image.new("RGB", (20, 30)).save("photo.jpg")
    told = {}
    exec(ours, told)
    assert told["features"].shape == (1, told["encoder"].feature_dim)
    size = told["encoder"].image_size
    told = {"images": torch.randn(2, 3, size, size)}
    with torch.no_grad():
        exec(theirs, told)
        wanted = load_encoder(run)(told["images"])
    torch.testing.assert_close(told["features"], wanted, rtol=0, atol=1e-5)


def test_a_network_that_timm_does_not_have(hub, run):
    saved(run, "torchvision")
    pushed(run)
    assert "model.safetensors" not in hub.repos["ada/digits"]
    assert b"Without this package" not in hub.repos["ada/digits"]["README.md"]


def test_the_card_is_filled_from_the_run(hub, run):
    pushed(run, "license=cc-by-4.0")
    card = hub.repos["ada/digits"]["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    for line in (
        "# digits",
        "| network | resnet10, width 4, small stem; 32 features |",
        "| method | simclr |",
        "| mixing | samix |",
        "| seed | 0 |",
        "| licence | cc-by-4.0 |",
        "| knn, during training | digits | last | 50.00 |  |  |",
        "| knn | digits | chosen | 90.00 | 359 | 0 |",
    ):
        assert f"\n{line}\n" in card, card


def test_the_command_of_the_card_makes_the_same_configuration(run):
    line = command_line(RunFolder(run))
    assert line.startswith("samix pretrain ")
    again, old = compose("pretrain", shlex.split(line)[2:])[0], RunFolder(run).load_config()[0]
    again, old = dotted(plain(again)), dotted(plain(old))
    assert " data.limit=64 " in line
    for key in old.keys() - {"out"}:  # later versions have further ones
        assert again[key] == old[key], key


def test_nothing_of_this_machine_is_sent(hub, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["out"] = config["data"]["root"] = config["config_dir"] = "/home/ada/secret"
    config["data"]["name"] = config["choices"]["data"] = "folder"
    config["trainer"]["extra"] = {"detect_anomaly": True}
    config["choices"]["logger"] = "mlflow"
    config["logger"] = {"mlflow": {"tracking_uri": "https://ada:secret@x"}}
    config["callbacks"]["extra"] = {"Timer": {"duration": "00:01:00:00"}}
    kept = without_paths(config)
    assert "secret" not in json.dumps(kept)
    assert kept["callbacks"]["extra"] == kept["trainer"]["extra"] == {}
    config["data"]["root"] = config["init"] = "/home/ada/secret"
    config["callbacks"]["extra"] = {"DeviceStatsMonitor": {"cpu_stats": True}}
    del config["logger"], config["choices"]["logger"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    pushed(run)
    for name, content in hub.repos["ada/digits"].items():
        assert b"secret" not in content, name
    assert RunFolder(huggingface_hub.snapshot_download("ada/digits")).load_config()
    assert " init=<run>" in hub.repos["ada/digits"]["README.md"].decode()


def test_a_name_cannot_write_into_the_card():
    hostile = "a|b`c`\n# <script>alert(1)</script> [x](http://y) **z**\x1b"
    shown = escaped(hostile)
    assert "\n" not in shown
    assert "\x1b" not in shown
    for sign in "|`#<>[]()*":
        assert shown.count(sign) == shown.count(f"\\{sign}"), sign


def test_a_hostile_repository_is_as_harmless_as_a_hostile_folder(hub, run, fails, tmp_path):
    pushed(run)
    text = hub.repos["ada/digits"]["config.yaml"].decode()
    config = yaml.safe_load(text)
    config["views"]["a"] = {"_target_": "builtins.open", "file": "witness", "mode": "w"}
    hub.repos["ada/digits"]["config.yaml"] = yaml.safe_dump(config).encode()
    assert "views.a._target_ is builtins.open" in fails("knn", "run=hf://ada/digits")
    assert not (tmp_path / "witness").exists()
    hub.repos["ada/digits"] = {"encoder.safetensors": b"\x80\x04 a pickle"}
    _fetched.cache_clear()
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        ssl_samix.load_encoder("hf://ada/digits")
    with pytest.raises(ConfigError, match="is not an address on the hub"):
        ssl_samix.load_encoder("hf://../../etc")


@pytest.mark.slow  # two processes
def test_as_it_is_typed(hub, run, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    env["HF_HUB_CACHE"] = str(tmp_path / "home" / "hub")
    done = samix("push", "run=run", "repo=ada/digits", cwd=tmp_path, env=env, check=True)
    assert done.stdout == "hf://ada/digits\n"
    words = ["run=hf://ada/digits", "k=[5]", "data.limit=64"]
    done = samix("knn", *words, cwd=tmp_path, env=env, check=True)
    assert "runs/ada-digits/results/" in done.stdout
