"""Planning: which schedule costs a model least for the all-reduces that it still waits for."""
