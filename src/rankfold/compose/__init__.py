"""From adapters to others: merged, squeezed, compressed, moved to another base, generated."""
