"""`serve`: answers questions about pages over HTTP, as OpenAI's chat API, with a page at / to try
it."""

import argparse
import importlib.util

from alignvlm_jax import storage
from alignvlm_jax.commands import usage
from alignvlm_jax.errors import UsageError, UserError, how_to_install
from alignvlm_jax.flag_types import positive

KEY = "ALIGNVLM_API_KEY"
"""Environment variable of the API key: flags are seen by all users of a machine."""
PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def main(argv: list[str]) -> None:
    args = _parse(argv)
    # Found without being imported, which takes a second.
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: {how_to_install('serve', 'setup')}")
    usage.check_run(args.checkpoint)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import serve

    serve.run(args, KEY)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = usage.parser(
        "serve",
        description=__doc__,
        epilog=f"{KEY}=KEY in the environment: requests must have it, as `Authorization: Bearer "
        "KEY`.",
    )
    parser.add_argument(
        "--checkpoint",
        type=storage.path,
        required=True,
        help="workdir, or one of its checkpoints/STEP",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; default %(default)s, this machine alone; 0.0.0.0: all",
    )
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s; 0: any")
    parser.add_argument("--model", help="name of the model in requests; default: that of the run")
    parser.add_argument(
        "--batch_size",
        type=positive,
        default=8,
        help="requests that are answered together at most; default %(default)s",
    )
    parser.add_argument(
        "--wait_ms",
        type=float,
        default=5.0,
        help="milliseconds that a request waits for others; default %(default)s",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=positive,
        help="tokens of an answer at most; default: 256, or that of the config where it is more",
    )
    parser.add_argument(
        "--max_body_mb", type=positive, default=32, help="of a request; default %(default)s"
    )
    parser.add_argument(
        "--max_pages", type=positive, default=16, help="of a request; default %(default)s"
    )
    parser.add_argument(
        "--queue", type=positive, default=256, help="requests that may wait; default %(default)s"
    )
    parser.add_argument(
        "--max_seconds",
        type=positive,
        default=60,
        help="that a request waits for its turn; default %(default)s",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port={args.port} is not 0 to 65535")
    if not 0 <= args.wait_ms <= 1000:
        raise UsageError(f"--wait_ms={args.wait_ms:g} is not 0 to 1000")
    return args
