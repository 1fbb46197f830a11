"""A converted model on real ranks: loading, communicating, launching, counting."""
