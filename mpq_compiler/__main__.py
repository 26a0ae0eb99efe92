"""``python -m mpq_compiler``: the same as `mpqc`."""

import sys

from mpq_compiler.cli.mpqc import main

sys.exit(main())
