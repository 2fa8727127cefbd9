"""Readable, checked graph optimisation for torch.compile: try it, measure it, see what it does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from graphopt.errors import GraphoptError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
console = Console()

_SYSTEMS = "eager,inductor,graphopt"
_TARGETS = "sm_80,sm_90,sm_100,gfx942"

_DTYPE = typer.Option(help="float32, bfloat16 or float16.")
_MODEL = typer.Option(help="smollm2, minilm, llama:HIDDENxLAYERS, or the path of a folder or .gguf file.")


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = "Give me three tips for sleeping well.",
    tokens: Annotated[int, typer.Option(help="How many tokens to answer with and to compare.")] = 64,
    dtype: Annotated[str, _DTYPE] = "float32",
    systems: Annotated[str, typer.Option(help="What to compare, as in `graphopt bench`.")] = _SYSTEMS,
) -> None:
    """Chat with SmolLM2-135M through graphopt, then compare with eager PyTorch and Inductor, side by side."""
    from graphopt.commands.demo import run

    run(prompt, tokens, dtype, systems, console)


@app.command()
def bench(
    model: Annotated[str, _MODEL] = "smollm2",
    work: Annotated[str, typer.Option(help="decode, prefill, encode; with commas.")] = "decode,prefill",
    systems: Annotated[
        str,
        typer.Option(
            help="eager, inductor, inductor-best, torchao-int8, llama.cpp[:KIND], graphopt-gguf, "
            "graphopt[:OPTION=VALUE...]. The first is what the others are compared with."
        ),
    ] = _SYSTEMS,
    dtype: Annotated[str, _DTYPE] = "float32",
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens in the cache before decode starts.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of a prefilled prompt.")] = 512,
    length: Annotated[int, typer.Option(help="Tokens of each encoded text.")] = 128,
    tokens: Annotated[int, typer.Option(help="Decoded tokens that are compared with the reference.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns that each system gets.")] = 16,
    warm: Annotated[bool, typer.Option("--warm", help="Use the compile caches of earlier runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the medians into this file (png, svg, pdf).")
    ] = None,
) -> None:
    """Measure systems side by side on one model: speed, memory, compile time, equal answers."""
    from graphopt.commands import bench as command
    from graphopt.commands import figures
    from graphopt.commands.progress import steps

    lengths = {"decode": context, "prefill": prompt, "encode": length}
    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path}: there is no folder {path.absolute().parent}")
    plan = command.plan(model, work, systems, dtype, batch, lengths, tokens, rounds, cold=not warm)
    result = command.run(plan, steps(console))
    for kind in result.costs:
        console.print(figures.table(result, kind))
    if json is not None:
        result.save(json)
    if plot is not None:
        figures.plot([result], plot)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=str(_MODEL.help))],
    dtype: Annotated[str, _DTYPE] = "float32",
    length: Annotated[int, typer.Option(help="Tokens of the text that the model is run on.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as one self-contained page to this file.")] = None,
    roofline: Annotated[
        str, typer.Option(help="The device that times are predicted for: auto, cpu, H100, ... (`graphopt.cost`).")
    ] = "auto",
    target: Annotated[str, typer.Option(help="Where the graph is lowered to, as the option `target`.")] = "auto",
) -> None:
    """Show what graphopt does to a model: passes, refusals, lowerings, bytes, FLOPs, predicted time, graph breaks."""
    from graphopt.commands.explain import explain_model

    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"{html}: there is no folder {html.absolute().parent}")
    report = explain_model(model, dtype, length, console, roofline, {"target": target})
    if html is not None:
        from graphopt.html import render

        html.write_text(render(report, f"{model}, {dtype}, {length} tokens"))
        Console(stderr=True).print(f"written to {html}", highlight=False)
    if json:
        sys.stdout.write(report.to_json() + "\n")
    elif html is None:
        console.print(report)


@app.command()
def quality(
    text: Annotated[Path, typer.Option(help="A text file; what the models are asked to predict.")],
    model: Annotated[str, _MODEL] = "smollm2",
    schemes: Annotated[str, typer.Option(help="int8, int4, q4_k, fp8, nf4, mxfp4, auto; with commas.")] = "int8,int4",
    dtype: Annotated[str, _DTYPE] = "float32",
    length: Annotated[int, typer.Option(help="Tokens that are predicted from one beginning.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are used at most.")] = 4096,
    group: Annotated[int | None, typer.Option(help="Group size of the schemes that have one.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file for the roundings that need inputs.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="nearest, gptq, awq or smoothquant.")] = "nearest",
    max_error: Annotated[str, typer.Option(help="The budget of scheme auto, or several with commas.")] = "",
    layers: Annotated[bool, typer.Option("--layers", help="Also show each weight's scheme and error.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw KL divergence against bytes (png, svg, pdf).")] = None,
) -> None:
    """Show what quantisation costs: perplexity, KL divergence, bytes, the error of each weight."""
    from graphopt.commands import quality as command

    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"{plot}: there is no folder {plot.absolute().parent}")
    asked = command.asked(schemes.split(","), group, rounding, max_error)
    found = command.run(model, text, asked, dtype, length, tokens, calibration, console)
    if plot is not None:
        command.plot(found, plot)
    if json:
        sys.stdout.write("[" + ",\n".join(quality.to_json() for quality in found) + "]\n")
        return
    for quality in found if layers else ():
        console.print(quality.plan)
    console.print(command.table(found))


@app.command()
def bisect(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments, after --.")],
    output: Annotated[bool, typer.Option("--output", help="Wrong means: another output than without any.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one run; longer counts as wrong.")] = None,
) -> None:
    """Find the rewrite that breaks a program: `graphopt bisect -- python generate.py`."""
    from graphopt import bisect as search

    found = search.run(command, compare_output=output, timeout=timeout, progress=console.print)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)


@app.command()
def kernels(
    model: Annotated[str, typer.Argument(help=str(_MODEL.help))],
    dtype: Annotated[str, _DTYPE] = "bfloat16",
    length: Annotated[int, typer.Option(help="Tokens of the prompt or text.")] = 128,
    targets: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100, gfx942; with commas.")] = _TARGETS,
    save: Annotated[Path | None, typer.Option(help="A folder for the generated files.")] = None,
) -> None:
    """Compile a model's generated Triton kernels, with no GPU, and print registers, spills, shared memory, occupancy.

    Exit status 1 when a kernel spills or does not fit.
    """
    from graphopt.commands import kernels as command

    if save is not None and not save.is_dir():
        raise typer.BadParameter(f"{save}: there is no such folder")
    if not command.run(model, dtype, length, targets.split(","), save, console):
        raise typer.Exit(1)


@app.command()
def passes() -> None:
    """List the passes in the order they run: what each does, in which stage, how exact it is."""
    from graphopt.commands.catalogue import pass_table

    console.print(pass_table())


def main() -> None:
    """Run the command line. Errors that say what to do are printed without a traceback; exit status 2."""
    try:
        app()
    except GraphoptError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
