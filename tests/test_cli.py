"""The command line: what it prints, and one line with exit code 2 for whatever a person can get wrong."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import __version__, catalog, cli, sources
from sightline.errors import ModelError
from sightline.steer.var import VAR
from tests.tiny_hosts import TINY, picture

HEAVY = {"torch", "transformers", "matplotlib", "numpy", "PIL", "timm", "sightline.catalog", "sightline.looking"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    host = TINY["llava"]()
    folder = tmp_path_factory.mktemp("models") / "llava"
    host.model.save_pretrained(folder)
    host.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """Every test stands in a folder of its own, which holds one good picture."""
    monkeypatch.chdir(tmp_path)
    for name in ("SIGHTLINE_DEBUG", "COLUMNS"):  # parallel test workers set a width
        monkeypatch.delenv(name, raising=False)
    picture().save("photo.png")
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def refused(run, place):
    """Run something that must fail: one line on stderr, exit code 2, nothing printed, nothing written or changed."""

    def call(*arguments: str) -> str:
        before = listing(place)
        done = run(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert re.fullmatch(r"sightline: [^\n]+\n", done.err)
        assert "Traceback" not in done.err
        assert listing(place) == before
        return done.err

    return call


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@dataclass
class FakeLook:
    """Stands for a look where only the command line is tested."""

    arguments: dict

    def save(self, out):
        (Path(out) / "report.html").write_text("<p>")
        return {"report": Path(out) / "report.html"}

    def to_json(self):
        return {"answer": "no ünicode problem"}

    def show(self, console):
        console.print("[red]shown[/]")


@pytest.fixture
def fake(monkeypatch) -> list[dict]:
    """Replace `look` by one that notes its arguments."""
    calls = []

    def look(image, question, **options):
        calls.append({"image": image, "question": question, **options})
        return FakeLook(calls[-1])

    monkeypatch.setattr("sightline.looking.look", look)
    return calls


# What cannot be read.


def save_film(path: Path) -> None:
    first, *rest = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(3)]
    first.save(path, save_all=True, append_images=rest)


def cut(path: Path) -> None:
    buffer = io.BytesIO()
    picture(120, 90).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[:900])


BAD_PICTURES = {
    "missing.png": (lambda path: None, "no such file"),
    "photo.pgn": (lambda path: None, "did you mean"),
    "corrupt.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(99))), "damaged"),
    "text.jpg": (lambda path: path.write_text("hello"), "damaged or no picture; save it as PNG"),
    "empty.png": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated.jpg": (cut, "cut off"),
    "dot.png": (lambda path: Image.new("RGB", (1, 1)).save(path), "1 x 1 pixels: too small"),
    "wide.png": (lambda path: Image.new("1", (20_000, 400)).save(path), "20000 x 400 pixels; at most 16384"),
    "folder.png": (lambda path: path.mkdir(), "it is a folder"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_pictures_that_cannot_be_used(refused, place, name):
    make, named = BAD_PICTURES[name]
    make(place / name)
    said = refused("look", name, "Is there a dog?")
    assert name in said
    assert named in said


GOOD_PICTURES = {
    "palette.png": lambda image, path: image.convert("P").save(path),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=95),
    "deep.png": lambda image, path: Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257).save(path),
    "alpha.png": lambda image, path: image.convert("RGBA").save(path),
    "bit.png": lambda image, path: image.convert("1").save(path),
    "film.gif#2": lambda image, path: save_film(path.with_name("film.gif")),
}


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_odd_pictures_are_simply_read(run, place, fake, name):
    GOOD_PICTURES[name](picture(), place / name)
    done = run("look", name, "Is there a dog?", "--out", "out")
    assert (done.code, done.err) == (0, "")
    assert fake[0]["image"].mode == "RGB"


def test_rotated_photographs_are_upright(run, fake):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 40).save("turned.jpg", exif=exif)
    assert run("look", "turned.jpg", "Is there a dog?").code == 0
    assert fake[0]["image"].size == (40, 60)


@pytest.mark.parametrize(
    ("question", "named"),
    [("", "the question '' is empty"), ("  ", "is empty"), ("why? " * 10_000, "50000 bytes long")],
)
def test_questions_that_cannot_be_used(refused, question, named):
    said = refused("look", "photo.png", question)
    assert named in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("vra", "unknown system 'vra': did you mean vhr or var"),
        ("var:q=1", "var has no parameter 'q'"),
        ("var:p=2", "p=2.0 is out of range; choose p in [0, 1]"),
        ("var:p=much", "cannot read p='much'; a value of type float is needed"),
        ("var:p", "cannot read 'p': write parameters as name=value"),
        ("none+vra", "unknown system 'vra'"),
        ("fna:dim=7,heads=7", "--with fna: it is of kind mix"),
        ("var + fna", "--with fna: it is of kind mix"),
    ],
)
def test_systems_that_cannot_be_used(refused, spec, named):
    assert named in refused("look", "photo.png", "Is there a dog?", "--with", spec)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "owner/none"], "model 'owner/none' is no folder here and not in the download cache"),
        (["--model", "."], "folder '.' holds no model (no config.json)"),
        (["--model", "./none"], "model './none': no such folder"),
        (["--model", "photo.png"], "model 'photo.png' is a file"),
        (["--device", "cuda"], "device 'cuda' is absent"),
        (["--device", "gpu"], "device='gpu' is unknown"),
        (["--dtype", "int3"], "dtype='int3' is not supported"),
        (["--quantization", "2bit"], "quantization='2bit' is not supported"),
        (["--device", "cpu", "--device-map", "auto"], "exclude each other"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is out of range: choose a whole number in [1, 4096]"),
        (["--max-new-tokens", "9999"], "max_new_tokens=9999 is out of range"),
        (["--seed", "-1"], "seed=-1 is out of range: choose seed in [0, 4294967295]"),
        (["--seed", "x"], "'--seed'"),
        (["--sed", "1"], "No such option: --sed"),
        (["--out", "photo.png"], "cannot write to 'photo.png': it is a file"),
        (["--out", "photo.png/out"], "cannot write to 'photo.png/out'"),
    ],
)
def test_options_that_cannot_be_used(refused, monkeypatch, options, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named in refused("look", "photo.png", "Is there a dog?", *options)


def test_a_text_only_model(refused, place, model):
    Path("llama").mkdir()
    config = json.loads((Path(model) / "config.json").read_text())["text_config"]
    Path("llama/config.json").write_text(json.dumps(config))
    Path("llama/model.safetensors").write_bytes((Path(model) / "model.safetensors").read_bytes())
    said = refused("look", "photo.png", "Is there a dog?", "--model", "llama")
    assert "model 'llama' (model_type 'llama') is text-only: a vision-language model is needed" in said


def test_a_model_that_does_not_fit(refused, model, monkeypatch):
    monkeypatch.setattr("sightline.memory.free_memory", lambda device: 1000)
    said = refused("look", "photo.png", "Is there a dog?", "--model", model, "--device", "cpu")
    assert "needs 0.0 GiB" in said
    assert "has 0.0 GiB free" in said


def test_the_bundled_model_missing(refused, monkeypatch, place):
    monkeypatch.setitem(sources.BUNDLED, "tiny", place / "gone")
    assert "the bundled model 'tiny' is missing" in refused("look")


def test_a_folder_with_other_files(refused, run, fake):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    said = refused("look", "photo.png", "Is there a dog?", "--out", "out")
    assert "folder 'out' holds other files (thesis.txt): choose another --out, or --force" in said
    assert run("look", "photo.png", "Is there a dog?", "--out", "out", "--force").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [".sightline.json", "report.html", "thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lok"], "No such command 'lok'"),
        (["card"], "Missing argument 'name'"),
        (["card", "vra"], "unknown system 'vra': did you mean vhr or var"),
        (["cite", "vra"], "unknown system 'vra'"),
        (["list", "--kind", "ster"], "unknown kind 'ster': did you mean steer"),
        (["look", "a", "b", "c"], "unexpected extra argument"),
        (["--no-such"], "No such option: --no-such"),
        (["scenes", "no-such"], "No such command 'no-such'"),
    ],
)
def test_commands_that_cannot_be_used(refused, arguments, named):
    assert named.lower() in refused(*arguments).lower()


# What fails on the way.


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (ModelError("too\n  large"), 2, "sightline: too large\n"),
        (KeyboardInterrupt(), 130, "sightline: interrupted\n"),
        (MemoryError(), 1, "sightline: out of memory: choose a smaller model"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "sightline: out of memory: choose"),
        (ZeroDivisionError("by zero"), 1, "SIGHTLINE_DEBUG=1 prints (ZeroDivisionError: by zero)\n"),
    ],
)
def test_failures_leave_nothing(run, place, fake, monkeypatch, error, code, named):
    def fail(self, out):
        (Path(out) / "report.html").write_text("half")
        raise error

    monkeypatch.setattr(FakeLook, "save", fail)
    before = listing(place)
    done = run("look", "photo.png", "Is there a dog?", "--out", "a/b")
    assert done.code == code
    assert named in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""
    assert listing(place) == before


def test_debugging_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("SIGHTLINE_DEBUG", "1")
    with pytest.raises(LookupError, match="vra"):
        run("card", "vra")


# What works.


def test_look_passes_everything_on(run, fake):
    options = ["--model", "m", "--with", "var:p=0.4,tau=20", "--max-new-tokens", "7", "--device", "cpu"]
    options += ["--dtype", "float32", "--seed", "5", "--quantization", "4bit"]
    assert run("look", "photo.png", " Is there a dog? ", *options).code == 0
    seen = fake[0]
    assert seen.pop("image").size == picture().size
    assert seen == {
        "question": " Is there a dog? ",
        "model": "m",
        "systems": [VAR(p=0.4, tau=20)],
        "max_new_tokens": 7,
        "device": "cpu",
        "dtype": "float32",
        "seed": 5,
        "quantization": "4bit",
    }
    assert run("look", "photo.png").code == 0
    assert fake[1]["systems"] == []
    assert fake[1]["question"] is None


def test_the_default_folder_is_named_after_the_picture(run, fake):
    save_film(Path("film.gif"))
    for image, folder in (("photo.png", "look-photo"), ("film.gif#2", "look-film")):
        done = run("look", image, "Is there a dog?")
        assert done.out == f"shown\n\nreport: {folder}/report.html\n"
        assert (Path(folder) / "report.html").read_text() == "<p>"


def test_without_arguments_the_example_is_shown(run, fake):
    assert run("look").code == 0
    assert run("look", "--with", "none", "--out", "other").code == 0
    assert fake[0]["image"].size == (336, 336)
    assert fake[0]["question"] == "Please describe this image in detail."
    assert fake[0]["systems"] == [VAR()]
    assert fake[1]["systems"] == []
    assert Path("look-example/report.html").exists()


def test_the_example_is_a_scene_of_the_generated_world():
    from sightline import scenes
    from sightline.images import open_image
    from sightline.looking import example

    path, _ = example()
    scene = json.loads(path.with_name("example.json").read_text())["scene"]
    drawn = np.asarray(scenes.draw(scene["seed"], context=scene["context"], size=scene["size"]).image)
    stored = open_image(path)
    assert (np.asarray(stored) != drawn).mean() < 0.01
    assert stored.info["Software"]
    assert scene["seed"] not in scenes.seeds("train", 2**31)


def test_json_is_all_that_is_printed(run, fake):
    done = run("look", "photo.png", "Is there a dog?", "--json")
    assert json.loads(done.out) == {
        "answer": "no ünicode problem",
        "files": {"report": "look-photo/report.html"},
    }
    assert done.err == ""


def test_a_real_look(run, model):
    done = run("look", "photo.png", "Is there a dog?", "--model", model, "--with", "var", "--max-new-tokens", "3")
    assert (done.code, done.err) == (0, "")
    assert "Is there a dog?" in done.out
    assert "\x1b" not in done.out
    assert "report: look-photo/report.html" in done.out
    names = {path.name for path in Path("look-photo").iterdir()}
    assert {"report.html", "look.json"} < names
    told = json.loads(
        run("look", "photo.png", "Is there a dog?", "--model", model, "--max-new-tokens", "3", "--json").out
    )
    assert told["runs"][0]["answer"] in done.out
    assert len(told["runs"]) == 1
    assert not Path("look-photo/overlay-1.png").exists()  # the folder of before is replaced


def test_list(run):
    entries = catalog.load_all()
    told = json.loads(run("list", "--json").out)
    assert [row["name"] for row in told] == list(entries)
    assert [row["name"] for row in json.loads(run("list", "--kind", "steer", "--json").out)] == [
        name for name, entry in entries.items() if entry.kind == "steer"
    ]
    lines = run("list").out.splitlines()
    assert len(lines) == 1 + len(entries)  # never wrapped
    for line, entry in zip(lines[1:], entries.values(), strict=True):
        assert line.startswith(entry.slug)
        assert entry.summary in line
        assert line == line.rstrip()


@pytest.mark.parametrize("name", sorted(catalog.load_all()))
def test_card(run, name):
    entry = catalog.entry(name)
    told = json.loads(run("card", name, "--json").out)
    parameters = [f.name for f in entry.parameters if f.init]
    assert [p["name"] for p in told["parameters"]] == parameters
    said = " ".join(run("card", name).out.split())
    for text in (entry.summary, *parameters):
        assert text in said
    for what, figure in entry.published:
        assert " ".join(what.split()) in said
        assert " ".join(figure.split()) in said
    assert told["python"].splitlines()[1] in said
    if entry.paper is None:
        assert "nothing to cite" in run("cite", name).err == run("card", name, "--bibtex").err
        return
    assert entry.paper.title in said
    assert entry.paper.url in said
    bibtex = run("card", name, "--bibtex").out
    assert bibtex == run("cite", name).out == entry.bibtex() + "\n"


def test_cards_show_defaults_as_they_are_written(run):
    said = " ".join(run("card", "lqcd").out.split())
    assert "lead I think the answer is yes." in said
    said = " ".join(run("card", "vasparse").out.split())
    assert "mode paper paper | release" in said
    assert "(licence: none stated)" in said


def test_card_of_var(run):
    said = run("card", "var").out
    assert re.search(r"p +0\.6 +0 \.\. 1 +share of the sinks' attention", said)
    assert "Seil Kang, Jinyeong Kim" in said
    command = re.search(r"sightline (look .*)", said)[1]
    assert "--with var:p=0.6" in command
    assert re.search(r"sl\.attach\(model, sl\.steer\.VAR\(\)\)", said)


def test_version_and_help(run):
    assert run("--version").out == f"sightline {__version__}\n"
    for arguments in ([], ["-h"], ["--help"]):
        done = run(*arguments)
        assert done.code == 0
        assert done.out.count("Usage: sightline") == 1
        assert all(
            name in done.out for name in ("look", "list", "card", "cite", "doctor", *cli.LAZY, *cli.LAZY_COMMANDS)
        )


@pytest.mark.parametrize("name", cli.LAZY)
def test_groups_that_load_when_chosen(run, name):
    done = run(name, "--help")
    assert done.code == 0
    assert done.out.count(f"Usage: sightline {name}") == 1
    assert "Commands" in done.out
    assert run(name).out.split() == done.out.split()


@pytest.mark.parametrize("name", cli.LAZY_COMMANDS)
def test_commands_that_load_when_chosen(run, name):
    done = run(name, "--help")
    assert done.code == 0
    assert done.out.count(f"Usage: sightline {name} [OPTIONS]") == 1


def test_exit_codes_of_other_commands_pass_through(monkeypatch, run):
    import typer

    from sightline.scenes import commands

    app = typer.Typer()

    @app.callback()
    def group() -> None:
        pass

    @app.command()
    def stop() -> None:
        raise typer.Exit(5)

    @app.command()
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "app", app)
    assert run("scenes", "stop").code == 5
    assert run("scenes", "interrupt").code == 130


# In a process of its own.


def python(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["look", "--help"], ["--version"], ["scenes", "--help"], ["nothing"]]
)
def test_help_imports_nothing_heavy(arguments):
    if arguments[0] == "scenes":
        heavy = {"torch", "transformers", "matplotlib"}
    else:
        heavy = HEAVY | {module for module, _ in (*cli.LAZY.values(), *cli.LAZY_COMMANDS.values())}
    code = f"import sys; from sightline.cli import main; main({arguments}); print({heavy} & set(sys.modules))"
    assert python("-c", code).stdout.splitlines()[-1] == "set()"


def test_importing_sightline_imports_nothing_heavy():
    code = f"import sys, sightline; print({HEAVY | {'typer', 'rich'}} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


def test_help_answers_in_half_a_second():
    """Processor time, which other work on the machine does not change; the best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "sightline", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_a_reader_that_leaves_early_is_no_error(argument):
    command = [sys.executable, "-m", "sightline", argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_exit_code_of_the_process():
    done = python("-m", "sightline", "--no-such")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
