"""`report`: writes report.html of a run, one file to look at in a browser."""

from alignvlm_jax import storage
from alignvlm_jax.commands import usage


def main(argv: list[str]) -> None:
    parser = usage.parser("report", description=__doc__)
    parser.add_argument(
        "--workdir",
        type=storage.path,
        required=True,
        help="of the run; the report is written into it",
    )
    parser.add_argument(
        "--compare", type=storage.path, help="another run's workdir, to stand beside it"
    )
    parser.add_argument("--data", help="folder that `prepare` wrote; default: the one trained on")
    args = parser.parse_args(argv)
    usage.check_run(args.workdir, needs_checkpoint=False)
    for workdir in filter(None, (args.workdir, args.compare)):
        usage.check_workdir(workdir, "report")
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.report import run

    print(f"Written: {run.build(args.workdir, args.compare, args.data)}")
