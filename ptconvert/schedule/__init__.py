"""The schedule: which sublayers run when, and how it is lowered, as data; no torch, no I/O."""
