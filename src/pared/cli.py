"""The command `pared`. Bad input is one line and exit code 2; a budget that is not met is exit code 1."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pared.errors import BudgetError, InputError, ParedError

app = typer.Typer(
    name="pared",
    help="Make a trained PyTorch network smaller and faster, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm:NAME, hf:NAME, FILE.py:FUNCTION, FILE.pt2 or FILE.pared")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="digits, mnist-5k, mnist:DIR, fashion-mnist[:DIR], photographs, folder:DIR, npz:FILE, text:FILE, hf:NAME or "
        "FILE.py:FUNCTION; not needed where MODEL's function returns (model, task)",
    ),
]
Device = Annotated[str, typer.Option(help="Where the network is calibrated, trained and measured: cpu, cuda, cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the final line.")]


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the file, the report and for going on.")],
    data: Data = None,
    size: Annotated[str | None, typer.Option(help='Size of the file: "20x", "5%", "1.2MB".')] = None,
    macs: Annotated[str | None, typer.Option(help='Multiply-adds: "2x", "50%", "300M".')] = None,
    latency: Annotated[str | None, typer.Option(help='"3x" or "3x@onnxruntime".')] = None,
    max_drop: Annotated[float | None, typer.Option(help="Accepted drop: points, or % of a score beyond [0, 1].")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe file, or the name of a shipped one.")] = None,
    store: Annotated[str | None, typer.Option(help="How the file is coded: smallest, fastest, huffman, rans.")] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Recover by distillation, or post-training only.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "cpu",
    lossless: Annotated[bool, typer.Option(help="MODEL is a safetensors file: the same bits in a smaller file, OUT.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress a trained network within a budget; the same command continues an interrupted run."""
    if lossless:
        asked = {"--data": data, "--size": size, "--macs": macs, "--latency": latency, "--max-drop": max_drop, "--recipe": recipe}
        _pack(model, out, store, [option for option, value in asked.items() if value is not None], as_json)
        return
    from pared import pipeline
    from pared.errors import RecipeError
    from pared.pipeline import Result
    from pared.recipe import STORES

    if store is not None and store not in STORES:
        raise RecipeError(f"--store must be one of {', '.join(STORES)}, got {store!r}")
    show = _Display(quiet or as_json)
    with show:
        net, task = _model_and_task(model, data, seed, device, show)
        failure: BudgetError | None = None
        try:
            result = pipeline.compress(
                net, task, recipe, size, macs, latency, max_drop, train, out, seed,
                store=store, progress=show, command=f"pared {shlex.join(sys.argv[1:])}",
            )
        except BudgetError as error:
            found = getattr(error, "result", None)
            if not isinstance(found, Result):
                raise
            failure, result = error, found
    _show_result(result.data, out, quiet, as_json)
    if failure is not None:
        raise failure
    if not result.met:
        missed = "the budget is not met"
        raise BudgetError(next((line for line in result.data["warnings"] if line.startswith(missed)), missed))


def _pack(model: str, out: Path, store: str | None, others: list[str], as_json: bool) -> None:
    from pared import artifact

    if others:
        raise InputError(f"--lossless keeps every bit, so it takes no {', '.join(others)}; drop one or the other")
    artifact.pack(model, out, store or "smallest")
    before, after = Path(model).stat().st_size, out.stat().st_size
    if as_json:
        typer.echo(json.dumps({"before": before, "after": after, "ratio": after / before}))
    else:
        typer.echo(f"{out}: {after / 1e6:.3f} MB, {100 * after / before:.1f} % of {model}; every bit is kept")


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A .pared file, or a model as for compress.")],
    as_json: Json = False,
) -> None:
    """Show what is in a file or a model, layer by layer, without running anything from it."""
    from pared import artifact, report, sources

    if target.endswith(".pared"):
        found = artifact.inspect(target)
    else:
        model, _ = sources.model(target)
        found = artifact.describe(model)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        report.inspection(found)


@app.command()
def sensitivity(
    model: Model,
    data: Data = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe whose candidates are tried.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A JSON file for the table.")] = None,
    seed: int = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Which layer hurts, with which technique: predicted damage per layer and option."""
    from pared import budget, report
    from pared import recipe as recipes
    from pared.place import prepared

    show = _Display(as_json)
    with show:
        net, task = _model_and_task(model, data, seed, device, show)
        task.check(net)
        _, steps, _ = recipes.load(recipe).parts()
        rows = budget.sensitivity(prepared(net)[0], task, list(steps[0].candidates), progress=show)
    if out is not None:
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        report.sensitivity_table(rows)


@app.command()
def bench(
    targets: Annotated[list[str], typer.Argument(metavar="A B …", help="Models or files; the first is the baseline.")],
    runtimes: Annotated[str, typer.Option(help="Of torch, compile, onnxruntime, openvino; with commas.")] = "torch",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each runtime.")] = 10.0,
    input_size: Annotated[str | None, typer.Option(help='Shape of an input without the batch, such as "3,224,224".')] = None,
    as_json: Json = False,
) -> None:
    """Measure latency, all interleaved in one run: median, 10th and 90th percentile, and the ratio to the first."""
    from pared import report
    from pared.measurement import bench as measure_bench

    if input_size and not all(part.strip().isdigit() for part in input_size.split(",")):
        raise InputError(f'--input-size must be like "3,224,224", got "{input_size}"')
    shape = tuple(int(part) for part in input_size.split(",")) if input_size else None
    rows = measure_bench(
        targets, tuple(runtimes.split(",")), batch_size=batch_size, threads=threads, seconds=seconds, input_shape=shape
    )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        report.bench_table(rows)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .pared file.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="onnx, openvino, compressed-tensors (with --model hf:NAME), or safetensors: the decoded weights alone"
        ),
    ] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: FILE with the runtime's ending.")] = None,
    model: Annotated[str | None, typer.Option(help="MODEL that FILE was made from: FILE is loaded into its class.")] = None,
    opset: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Export a file for a runtime, checked against our own output."""
    from pared import artifact, runtimes, sources
    from pared.record import record_of
    from pared.sources.text import loaded_tokenizer

    target = out or file.with_suffix({"openvino": ".xml", "compressed-tensors": ""}.get(to, f".{to}"))
    if to == "safetensors" and model is not None:
        raise InputError("safetensors are written without the model; leave --model out")
    if to == "safetensors":
        artifact.unpack(file, target)
        typer.echo(f"{target}: {target.stat().st_size / 1e6:.3f} MB")
        return
    if model is None and to == "compressed-tensors":
        raise InputError("compressed-tensors are for a class of transformers; say which with --model hf:NAME")
    if model is None:
        written = runtimes.export(file, target, to=to, opset=opset)
    else:
        net, facts = sources.model(model)
        loaded = artifact.load(file, net)
        record = record_of(loaded)
        known = None if record is not None and record.example is not None else facts.example or facts.example_kwargs or None
        written = runtimes.export(loaded, target, to=to, example=known, opset=opset)
        if to == "compressed-tensors":
            try:
                loaded_tokenizer(facts).save_pretrained(target)
            except InputError as error:
                typer.echo(f"without a tokenizer: {error}", err=True)
    typer.echo(f"{target}: {written.file_bytes / 1e6:.3f} MB, error {written.max_relative_error:.2g} of the largest output")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: report.html in the folder.")] = None,
) -> None:
    """Write the report of a run anew from its result.json."""
    from pared.report import report as write

    source = folder / "result.json"
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{source} must be the result of a finished run, but it cannot be read: {error}") from error
    target = out or folder / "report.html"
    write(found, target)
    typer.echo(str(target))


@app.command()
def techniques(
    name: Annotated[str | None, typer.Argument(help="One technique, with its settings.")] = None, as_json: Json = False
) -> None:
    """List the techniques, or show one with its settings, ranges and paper."""
    from pared import registry
    from pared import report as reports

    if name is None:
        rows = [registry.describe(each) for each in registry.names()]
    else:
        rows = [registry.describe(name)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        reports.techniques_table(rows, details=name is not None)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("pared-demo"),
    seed: int = 0,
    quiet: Quiet = False,
) -> None:
    """Train a small net on scikit-learn's digits, compress it, and write the report: about a minute."""
    from pared import demo as demonstration

    show = _Display(quiet)
    with show:
        result = demonstration.run(out, seed, show)
    _show_result(result.data, out, quiet, False)


class _Display:
    """Progress on the terminal: a bar with the remaining time for what takes longer than two seconds."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent
        self.live: Any = None
        self.tasks: dict[str, Any] = {}
        self.since: dict[str, float] = {}

    def __enter__(self) -> _Display:
        if not self.silent:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.console = Console(stderr=True)
            self.live = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=self.console, transient=True,
            )
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if self.live is None:
            return
        if "say" in event:
            self.live.console.print(event["say"], markup=False, highlight=False)
            return
        if "phase" in event:
            self._clear()
            self.tasks[event["phase"]] = None
            self.since[event["phase"]] = time.monotonic()
            return
        if "epoch" in event:
            name = f"epoch {event['epoch']} of {event['epochs']}"
            done, total = event.get("batch"), event.get("batches")
        else:
            name, done, total = str(event.get("doing", "working")), event.get("done"), event.get("total")
        if name not in self.since:
            self._clear()
            self.since[name] = time.monotonic()
        if self.tasks.get(name) is None and time.monotonic() - self.since[name] > 0.5 and total:
            self.tasks[name] = self.live.add_task(name, total=total)
        if self.tasks.get(name) is not None and done is not None:
            self.live.update(self.tasks[name], completed=done, total=total)

    def _clear(self) -> None:
        for task in self.tasks.values():
            if task is not None:
                self.live.remove_task(task)
        self.tasks.clear()
        self.since.clear()


def _model_and_task(model: str, data: str | None, seed: int, device: str, show: _Display) -> tuple[Any, Any]:
    import torch

    from pared import sources

    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torch asserts that it was built for one
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device must be one that torch can use here, got {device!r}: {reason}") from error
    net, facts = sources.model(model)
    net.to(device)
    if data is None:
        if facts.task is None:
            raise InputError(f"--data must say which data {model} is for; give for example --data digits")
        return net, facts.task
    found = sources.data(data, net, seed=seed, facts=facts)
    for note in found.notes:
        show({"say": note})
    return net, found.task


def _show_result(data: dict[str, Any], out: Path, quiet: bool, as_json: bool) -> None:
    from pared import report as reports

    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    if not quiet:
        reports.terminal(data)
    typer.echo(f"{out / 'model.pared'}  {out / 'report.html'}")


def main() -> None:
    """Run the command line; errors raised on purpose are one line each."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.argv[1:] = arguments
    try:
        app(arguments, standalone_mode=False)
    except ParedError as error:
        if debug:
            raise
        typer.echo(f"{type(error).__name__}: {' '.join(str(error).split())}", err=True)
        raise SystemExit(error.exit_code) from error
    except (KeyboardInterrupt, typer.Abort) as error:
        typer.echo(f"\ninterrupted; go on with: pared {shlex.join(arguments)}", err=True)
        raise SystemExit(130) from error
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from stop
    except OSError as error:
        if debug:
            raise
        typer.echo(f"InputError: {error.filename or 'the disk'}: {error.strerror}; nothing is lost, run it again", err=True)
        raise SystemExit(2) from error
    except Exception as error:
        if debug or not hasattr(error, "format_message"):
            raise
        if message := error.format_message():
            typer.echo(f"InputError: {message}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
