"""`python -m bilevel`, which launchers such as torchrun call."""

from bilevel.cli import main

main()
