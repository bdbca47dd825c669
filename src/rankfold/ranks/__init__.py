"""How much rank each layer gets, and when that changes: one file a method."""
