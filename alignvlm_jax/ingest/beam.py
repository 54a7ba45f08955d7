"""A runner of `prepare` on Apache Beam, for sources that are too large for one machine.

The parts that it writes are the same, byte for byte, as those of local processes.
"""

from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.job import Runner
from alignvlm_jax.ingest.writer import UnitWriter

try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    apache_beam = None


def on_runner(name: str, flags: list[str]) -> Runner:
    """Returns a function that runs a UnitWriter under Apache Beam.

    All workers have to see the writer's folder, on a shared disk or a mounted bucket.

    Args:
      name: Beam's name of a runner, as DirectRunner or DataflowRunner.
      flags: Beam's pipeline options, as `--key=value`.

    Raises:
      UserError: Beam is not installed, or knows no such runner or flag.
    """
    if apache_beam is None:
        raise UserError(
            "Apache Beam is not installed; `make beam` puts it into .venv-beam "
            "(requirements-beam.txt)"
        )
    try:
        # The runner is created here only to fail early: a Pipeline would do so after the source
        # was listed.
        options = PipelineOptions([f"--runner={name}", *flags])
        apache_beam.runners.create_runner(name)
    except (ValueError, ImportError, AttributeError) as err:
        raise UserError(f"Apache Beam has no runner {name!r} with flags {flags} ({err})") from err

    def run(writer: UnitWriter, tasks: list[tuple[int, Unit]]) -> None:
        with apache_beam.Pipeline(options=options) as pipeline:
            # Create makes one bundle of its values, and one worker would do it all: Reshuffle
            # breaks the bundle up.
            _ = (
                pipeline
                | apache_beam.Create(tasks)
                | apache_beam.Reshuffle()
                | apache_beam.FlatMap(writer)
            )

    return run
