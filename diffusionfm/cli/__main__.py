"""python -m diffusionfm.cli"""

import sys

from diffusionfm.cli import main

sys.exit(main())
