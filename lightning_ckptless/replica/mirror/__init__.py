"""How a version gets into the slots of its holders, once per version."""
