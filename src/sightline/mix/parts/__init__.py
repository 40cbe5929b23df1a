"""What several mixers share: their base class, query and key groups, windows on axes, local branches."""
