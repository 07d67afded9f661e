"""`python -m radixkv.replay`: the replay command alone."""

import sys

import typer

from radixkv.errors import RadixKVError
from radixkv.replay.cli import replay

if __name__ == "__main__":
    try:
        typer.run(replay)
    except RadixKVError as error:
        sys.exit(f"error: {error}")
