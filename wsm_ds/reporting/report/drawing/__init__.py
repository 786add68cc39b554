"""Figures as SVG, without scripts: `draw` makes one drawing of a given width."""
