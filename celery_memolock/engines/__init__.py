"""What runs flights. Each engine sends a flight's message and wraps its run; none holds locking code."""
