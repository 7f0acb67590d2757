"""Where certificates come from: one adapter per upstream CA behind one protocol."""
