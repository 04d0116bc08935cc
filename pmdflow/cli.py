"""The command line: parse and dispatch only. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pmdflow.errors import PmdflowError

app = typer.Typer(
    help="Asynchronous RL post-training of language models by online policy mirror descent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes takes as long as everything else of `--help`
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"pmdflow {version('pmdflow')}")
        raise typer.Exit


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, for example runs/quickstart.")]


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    """Asynchronous RL post-training of language models by online policy mirror descent."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to write to.")] = Path(),
    template: Annotated[
        Literal["quickstart", "math", "tool", "gpu", "cluster", "k15"], typer.Option(help="What to begin with.")
    ] = "quickstart",
) -> None:
    """Write a configuration to begin with, and what it needs."""
    from pmdflow.init.command import init as write

    raise typer.Exit(write(directory, template))


@app.command()
def up(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings over the file's: scheduler.max_staleness=4"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and the plan; start nothing.")
    ] = False,
) -> None:
    """Train; on a run directory that exists already, resume."""
    from pmdflow.config.installed import require_engine, require_imports, require_variables
    from pmdflow.config.load import load

    loaded = load(config, overrides or ())
    if not dry_run or loaded.config.cluster.gpus is None:  # else it is planned for another machine than this one
        require_engine(loaded.config.rollout)
    require_imports(loaded)
    require_variables(loaded)
    if dry_run:
        from pmdflow.run.inputs import dry_run as plan

        typer.echo(plan(loaded))
        return
    from pmdflow.run.launch import up as train

    raise typer.Exit(train(loaded))


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings over the file's.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Fit engine, learner and lengths to this run.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of each policy.")] = 40,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Also write a plot.")] = None,
    advice: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Only say what to change, found within this time."),
    ] = None,
) -> None:
    """Say how a configuration would run, beside other modes: throughput, waiting, age and masking of tokens."""
    from pmdflow.config.gpus import planned_gpus
    from pmdflow.config.load import load
    from pmdflow.config.settle import settle
    from pmdflow.run.simulation.command import short_advice
    from pmdflow.run.simulation.command import simulate as report

    written = load(config, overrides or ()).config
    loaded = settle(written, gpus=planned_gpus(written))
    if advice is not None:
        typer.echo("\n".join(short_advice(loaded, run=run, seconds=advice)))
    else:
        typer.echo(report(loaded, run=run, iterations=iterations, out=out))


@app.command("check-policy")
def check_policy(
    policy: Annotated[str, typer.Argument(metavar="MODULE:NAME", help="As in scheduler.policy.")],
    examples: Annotated[int, typer.Option(min=1, help="Random histories.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the histories.")] = 0,
) -> None:
    """Try a scheduling policy on random histories of the real store: does it keep every bound, and end?"""
    from pmdflow.run.simulation.check import check_command

    typer.echo(check_command(policy, examples=examples, seed=seed))


@app.command("check-algorithm")
def check_algorithm(
    algorithm: Annotated[str, typer.Argument(metavar="NAME", help="As in learner.algorithm.")],
    components: Annotated[
        list[str] | None, typer.Option("--component", help="Reward component that it reads; may be repeated.")
    ] = None,
) -> None:
    """Try an algorithm on made-up claims: is it finite, repeatable, and the same however a claim is split?"""
    from pmdflow.learner.conformance import check_algorithm as check

    try:
        typer.echo(check(algorithm, components=components or ()))
    except ValueError as error:
        raise PmdflowError(str(error)) from error


@app.command()
def down(run: Run) -> None:
    """Stop a run, also from another terminal; `up` resumes it."""
    from pmdflow.run.status import down as ask_to_drain

    raise typer.Exit(ask_to_drain(run))


@app.command()
def status(run: Run) -> None:
    """Say how a run stands."""
    from pmdflow.run.status import status as show

    raise typer.Exit(show(run))


@app.command()
def dashboard(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directory; several are compared.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to serve at; any but this machine's own asks for a token.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Show a live or finished run in the browser, or compare several."""
    from pmdflow.dashboard import server

    server.serve(runs, host=host, port=port)


@app.command()
def replay(
    run: Run,
    verify: Annotated[
        bool, typer.Option("--verify", help="Train again on the recorded claims and compare the losses.")
    ] = False,
    start: Annotated[
        int, typer.Option("--from", metavar="ITERATION", min=0, help="Begin at this iteration's checkpoint; 0 is v0.")
    ] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: learner.tau=0.1")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", metavar="OUT", help="Make a new run, trained on the stored rollouts.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Compare --set with this setting, claim by claim; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="With --against: also write a plot.")] = None,
) -> None:
    """Run stored rollouts again, offline, without rollout actors."""
    if sum((verify, train is not None, bool(against))) > 1 or (train is not None and start) or (out and not against):
        raise PmdflowError(
            "--verify, --train and --against are three different things, --from goes with the first and the last, "
            "--out with the last",
            hint="give one of them",
        )
    if train is not None:
        from pmdflow.replay.training import train_on_stored

        raise typer.Exit(train_on_stored(run.absolute(), train.absolute(), overrides or ()))
    if against:
        from pmdflow.replay.comparison import compare

        raise typer.Exit(compare(run.absolute(), overrides or (), against, start=start, out=out))
    from pmdflow.replay.command import replay as train_again

    raise typer.Exit(train_again(run, verify=verify, start=start, overrides=overrides or ()))


@app.command("eval")
def eval_(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="Run, RUN/checkpoints/iteration-N, or Hugging Face folder."),
    ],
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="A .jsonl or .parquet file, reasoning_gym/NAME, or a configuration .yaml."),
    ],
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Attempts at each prompt.")] = 4,
    k: Annotated[list[int] | None, typer.Option("--k", help="k of pass@k; default: powers of two.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Most prompts.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1.0, help="Share of probability to sample from.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    min_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens before which an answer cannot end.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="MODULE:NAME", help="Reward function; may be repeated.")
    ] = None,
    pass_reward: Annotated[float, typer.Option(help="Least reward of an attempt that counts for pass@k.")] = 1.0,
    engine: Annotated[str | None, typer.Option(help="transformers or vllm.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for samples.jsonl and summary.json.")] = None,
) -> None:
    """Evaluate a checkpoint on a task: avg@n and pass@k with confidence intervals."""
    from pmdflow.evaluate.command import EvalOptions, evaluate_checkpoint

    options = EvalOptions(
        samples=samples, ks=k or (), prompts=prompts, temperature=temperature, top_p=top_p, max_tokens=max_tokens,
        min_tokens=min_tokens, stop=stop or (), reward=reward or (), pass_reward=pass_reward, engine=engine, seed=seed,
        out=out,
    )  # fmt: skip
    raise typer.Exit(evaluate_checkpoint(checkpoint, task, options))


@app.command()
def store(
    run: Run,
    action: Annotated[
        Literal["list", "show", "discard"], typer.Argument(metavar="ACTION", help="list, show or discard.")
    ] = "list",
    group: Annotated[int | None, typer.Argument(min=0, metavar="GROUP", help="Which one.")] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why it is discarded, for the record.")] = None,
) -> None:
    """List the groups of a run's store, show one, or discard one that cannot be trained; also of a live run."""
    from pmdflow.run.stored import stored

    raise typer.Exit(stored(run, action, group=group, reason=reason))


@app.command()
def scale(
    run: Run,
    wanted: Annotated[str, typer.Argument(metavar="rollout=N", help="How many rollout actors there shall be.")],
) -> None:
    """Give a live run more or fewer rollout actors; a resume remembers how many."""
    from pmdflow.run.scaling import ask

    typer.echo(ask(run, wanted))


@app.command()
def sink(
    run: Run,
    name: Annotated[
        Literal["wandb", "tensorboard", "prometheus", "trackio"], typer.Argument(metavar="NAME", help="Where to.")
    ],
) -> None:
    """Send a run's metrics on: what is there, and, while it lives, what comes."""
    from pmdflow.metrics.sinks.command import run_sink
    from pmdflow.run.directory import RunDirectory

    raise typer.Exit(run_sink(run, name, is_live=lambda: RunDirectory.is_live(run)))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    iteration: Annotated[int | None, typer.Option(min=1, help="That of the checkpoint; default: the newest.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter/--merged", help="Of a LoRA run: the adapters alone, or added to the weights.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; default: the run's, for adapters float32."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Upload the folder to this repository of the Hub, new ones private."),
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, also of a live run."""
    from pmdflow.export.command import export_checkpoint
    from pmdflow.export.options import ExportOptions

    options = ExportOptions(iteration=iteration, adapter=adapter, dtype=dtype, push=push)
    raise typer.Exit(export_checkpoint(run, out, options))


def _open_closed_streams() -> None:
    """Where a caller has closed a standard stream, its number is taken: no file of a run may get what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad configuration or usage, 130 interrupted."""
    _open_closed_streams()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except PmdflowError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}\n\nhint: free space on its disk", file=sys.stderr)
            sys.exit(1)
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # or the interpreter would fail once more when it ends
        if error.errno != errno.EPIPE:  # a reader that has seen enough is no failure to speak of
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
