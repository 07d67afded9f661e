"""`python -m radixkv` is the command line."""

from radixkv.cli import main

main()
