"""Where the factors of a low-rank update start: one file a start."""
