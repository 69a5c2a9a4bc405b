"""Networks and frozen priors; nothing in here knows about training."""
