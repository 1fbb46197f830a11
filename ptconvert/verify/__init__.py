"""What a converted model does on real ranks."""
