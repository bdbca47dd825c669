"""How the update ΔW is parameterised: one file a method."""
