"""`python -m ptconvert`."""

from ptconvert.cli import main

main(prog_name="ptconvert")
