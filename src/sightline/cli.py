"""The command line. Light at import; whatever is heavy loads when its command is chosen.

Every error that a person can cause is one line on stderr and exit code 2; nothing is then left half-written.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sightline import __version__
from sightline.console import make_console, print_json, say, status
from sightline.errors import InputError, ParameterError, SightlineError, check_range

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.clips import Clip

# Commands with sub-commands of their own: name -> (module with `app`, what --help says).
LAZY = {
    "bench": ("sightline.bench.commands", "Measure mixers against tokens, neighborhood attention's bounds, backbones."),
    "study": ("sightline.explain.commands", "Reproduce a paper's analysis on a model, with figures and a page."),
    "scenes": ("sightline.scenes.commands", "Draw the generated world; export COCO, LLaVA and POPE files."),
    "train": (
        "sightline.learn.commands",
        "Train the bundled tiny LLaVA, tune a LLaVA on your own dialogues or by diffusion feedback, train a classifier.",
    ),
}
# Commands that live in such a module: name -> (module, what --help says).
LAZY_COMMANDS = {
    "compare": ("sightline.evaluate.commands", "Quality and cost of systems side by side, in one table."),
    "tune": ("sightline.evaluate.commands", "Find a system's parameters on one split, report on another."),
}


class Interrupted(Exception):
    """Ctrl-C in a command that does not handle it itself."""


class LazyGroup(TyperGroup):
    """Shows the commands of LAZY and LAZY_COMMANDS in its help, and imports one only when it is chosen."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in LAZY:
            command = typer.main.get_group(import_module(LAZY[name][0]).app)
            command.name = name
        elif name in LAZY_COMMANDS:
            command = typer.main.get_group(import_module(LAZY_COMMANDS[name][0]).app).commands[name]
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    cls=LazyGroup,
    help="See where a vision-language model looks, and change it.",
    epilog="Try: sightline look    (the bundled picture, question and model)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Name = Annotated[str, typer.Argument(help="A system, as in `sightline list`.", show_default=False)]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sightline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def look(
    image: Annotated[
        str | None,
        typer.Argument(
            help="A picture, an animation or a folder of frames; film.gif#3 is one frame. Left out: the bundled example."
        ),
    ] = None,
    question: Annotated[str | None, typer.Argument(help="What to ask about it.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="tiny (bundled), a folder, or a Hub id.")] = "tiny",
    systems: Annotated[
        str | None,
        typer.Option("--with", "-w", help="Systems to answer with as well: var, var:p=0.4,tau=20, a+b, none."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for report.html and figures; by default look-NAME."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into --out even when it holds other files.")] = False,
    frames: Annotated[
        int | None, typer.Option(help="Frames of a video to look at, evenly spaced; by default at most 32.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps; by default the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device_map: Annotated[str | None, typer.Option(help="auto: spread the model over all devices.")] = None,
    quantization: Annotated[str | None, typer.Option(help="4bit or 8bit.")] = None,
    seed: Annotated[int, typer.Option(help="For whatever is random in the systems.")] = 0,
    json: Json = False,
) -> None:
    """Ask a model about a picture: the answer without and with systems, where it looked, and a report."""
    from sightline.lvlm import check_max_new_tokens, check_question
    from sightline.outfolder import fresh_folder

    check_max_new_tokens(max_new_tokens)
    check_range("seed", seed, 0, 2**32 - 1)
    if question is not None:
        check_question(question)
    name = "example" if image is None else Path(image).stem
    if image is None:
        image, question, systems = _example(systems)
    picture = _open(image, frames)
    out = Path(f"look-{name}") if out is None else out.expanduser()
    placement = {"device_map": device_map, "quantization": quantization}
    options = {key: value for key, value in placement.items() if value is not None}
    with fresh_folder(out, force) as folder:
        from sightline.looking import look

        chosen = _parse(systems or "none")
        with status(f"asking {model}", show=Path(model).is_dir() or model == "tiny"):  # a download has its own bars
            seen = look(
                picture, question, model=model, systems=chosen, max_new_tokens=max_new_tokens,
                device=device, dtype=dtype, seed=seed, **options,
            )  # fmt: skip
            files = seen.save(folder)
    files = {key: str(out / Path(path).relative_to(folder)) for key, path in files.items()}
    if json:
        print_json(seen.to_json() | {"files": files})
        return
    console = make_console()
    seen.show(console)
    say(console, f"\nreport: {files['report']}")


def _open(image: str | Path, frames: int | None) -> Image | Clip:
    """A picture, or the clip with as many frames as asked for."""
    from sightline.clips import MAX_FRAMES, is_clip, open_clip
    from sightline.images import open_image

    if is_clip(image):
        return open_clip(image, MAX_FRAMES if frames is None else frames)
    if frames is not None:
        raise InputError(f"--frames {frames}: {str(image)!r} is one picture, no video: leave --frames out")
    return open_image(image)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="Only this kind, for example steer.")] = None, json: Json = False
) -> None:
    """The catalogue of systems."""
    from sightline import cards

    entries = cards.choose(kind)
    if json:
        print_json([cards.summary(entry) for entry in entries])
    else:
        cards.print_list(entries, make_console())


@app.command()
def card(
    name: Name,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print the BibTeX entry only.")] = False,
    json: Json = False,
) -> None:
    """One system: paper, parameters, published figures, how to use and cite it."""
    from sightline import cards, catalog

    entry = catalog.entry(name)
    if json:
        print_json(cards.card(entry))
    elif bibtex:
        print(entry.bibtex())
    else:
        cards.print_card(entry, make_console())


@app.command()
def cite(name: Name) -> None:
    """The BibTeX entry of a system's paper."""
    from sightline import catalog

    print(catalog.entry(name).bibtex())


@app.command()
def doctor(json: Json = False) -> None:
    """What is installed, which device, which models; does the bundled model answer?"""
    from sightline import doctor as diagnosis

    checks = diagnosis.examine()
    if json:
        print_json([vars(check) for check in checks])
    else:
        diagnosis.show(checks, make_console())
    raise typer.Exit(int(any(check.status == "fault" for check in checks)))


for _name, (_module, _help) in LAZY.items():
    app.add_typer(typer.Typer(), name=_name, help=_help)
for _name, (_module, _help) in LAZY_COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)  # only its line in --help; LazyGroup puts the real one in its place


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 well, 1 defect, 2 the user can mend it, 130 interrupted."""
    debug = bool(os.environ.get("SIGHTLINE_DEBUG"))
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        try:
            code = app(args=argv, prog_name="sightline", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except BrokenPipeError:  # the reader, for example `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if debug:
                raise
            return _complain(error)


def _complain(error: Exception) -> int:
    """One line on stderr; the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(end=error.format_message())  # rich help has been printed by now; plain help is the message
        return 0
    if isinstance(error, SightlineError):
        line, code = str(error), 2
    elif isinstance(error, Interrupted):
        line, code = "interrupted", 130
    elif hasattr(error, "format_message"):  # typer's own: unknown option, wrong type
        command = context.command_path if context else "sightline"
        line, code = f"{error.format_message().rstrip('.')} (see `{command} --help`)", 2
    elif isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        line, code = "out of memory: choose a smaller model, --dtype bfloat16 or --quantization 4bit", 1
    else:
        what = f"{type(error).__name__}: {error}"
        line, code = f"internal error, please report it with what SIGHTLINE_DEBUG=1 prints ({what})", 1
    print("sightline:", " ".join(line.split()), file=sys.stderr)
    return code


def _parse(spec: str) -> list[Any]:
    """The systems of `--with`; ParameterError for one that does not act on a model while it answers."""
    from sightline.catalog import ENTRIES, load_all, parse

    load_all()
    for part in spec.split("+"):
        found = ENTRIES.get(part.strip().partition(":")[0])
        if found is not None and found.kind == "mix":
            raise ParameterError(
                f"--with {found.slug}: it is of kind mix, a module to build networks with; it does not act on a model that "
                "answers (`sightline list --kind steer`, decode or prune for those that do)"
            )
    return parse(spec)


def _example(systems: str | None) -> tuple[str, str, str]:
    """Picture, question and systems of the bundled example."""
    import json

    folder = Path(__file__).parent / "examples"
    card = json.loads((folder / "example.json").read_text(encoding="utf-8"))
    return str(folder / card["image"]), card["question"], card["with"] if systems is None else systems
