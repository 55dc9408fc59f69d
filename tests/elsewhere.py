"""Runs a script in the folder FOOTPRINT_TEST_CWD: python tests/elsewhere.py /path/of/script.py argv."""

import os
import runpy
import sys

if __name__ == "__main__":
    os.chdir(os.environ["FOOTPRINT_TEST_CWD"])
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
