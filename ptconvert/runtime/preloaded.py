"""What ranks on CPUs are forked with: all that takes long to import, quietly, as the process that
they are forked from has none of the settings of the one that asked for them."""

from __future__ import annotations

from ptconvert.runtime.quiet import quiet_libraries

quiet_libraries()

import ptconvert.runtime.load  # noqa: E402, F401
