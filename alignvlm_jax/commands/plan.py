"""`plan`: what a stage needs on a TPU slice, by the TPU's own compiler and without a TPU."""

import argparse
import sys

from alignvlm_jax.commands import config_flag, usage
from alignvlm_jax.commands.config_flag import ConfigFlags
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.flag_types import amount, positive
from alignvlm_jax.plan import hardware

# A status of its own: 1 and 2 are errors, and a plan that does not fit is an answer.
DOES_NOT_FIT = 3


def main(argv: list[str]) -> None:
    """Runs the command: prints the plan, and exits with status 3 if it does not fit.

    Raises:
      UsageError: the stage cannot be planned as the flags ask.
    """
    # All mistakes in the input end with status 2, also those in a config.
    try:
        given, args = _parse(argv)
        stages = config_flag.stages(given)
        # Only now: what is misspelt should be answered before all of this is imported.
        from alignvlm_jax.commands.work import plan

        fits = plan.run(stages, args)
    except UsageError:
        raise
    except UserError as err:
        raise UsageError(str(err)) from err
    if not fits:
        sys.exit(DOES_NOT_FIT)


def _parse(argv: list[str]) -> tuple[ConfigFlags, argparse.Namespace]:
    """Returns the flags of the config, and the others."""
    parser = usage.parser(
        "plan",
        description="Compiles a stage's training step, or its generation, for a TPU slice and "
        "says what it needs.",
        usage=f"%(prog)s {config_flag.USAGE} --topology=v5p:4x4x4 [--num_slices=2] [--mesh=auto | "
        "--generate] [--price_per_chip_hour=NUMBER] [--json] [--config.a.b=VALUE ...]",
        epilog=config_flag.HELP,
        others=config_flag.flags_of_fields(),
    )
    parser.add_argument(
        "--topology", required=True, help="such as v5e:4x4; v5e:smallest looks for one that fits"
    )
    parser.add_argument(
        "--num_slices", type=positive, default=1, help="of that shape, joined by the network"
    )
    parser.add_argument(
        "--mesh", default="", help="DATAxFSDPxTENSOR, or auto: tries those that divide"
    )
    parser.add_argument(
        "--price_per_chip_hour", type=amount, help="in any currency: what steps and stage cost"
    )
    parser.add_argument("--stage", default="", help="of several in the config")
    parser.add_argument(
        "--generate", action="store_true", help="of evaluation: prompts as long as one record's"
    )
    parser.add_argument("--json", action="store_true", help="one object and nothing else on stdout")
    given, rest = config_flag.split(argv)
    args = parser.parse_args(rest)
    if given.file is None:
        parser.error(config_flag.REQUIRED)
    is_smallest = args.topology.endswith(":smallest")
    if args.generate:
        why = "is of training, and left out with --generate, whose time no plan tells"
        parser.check_used(argv, ("--price_per_chip_hour",), why)
    if args.generate and (args.mesh == "auto" or is_smallest):
        raise UsageError(
            "--generate plans for one slice and mesh: say --topology=KIND:SHAPE and "
            "--mesh=DATAxFSDPxTENSOR"
        )
    if is_smallest:
        why = "is left out with --topology=KIND:smallest, which looks for one slice and its mesh"
        parser.check_used(argv, ("--mesh", "--num_slices"), why)
        hardware.check_kind(args.topology.partition(":")[0])
    else:
        # For its error, which should not wait for the config.
        hardware.parse_topology(args.topology, args.num_slices)
    return given, args
