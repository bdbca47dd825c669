"""How the adapter's parameters are stepped: one file a method."""
