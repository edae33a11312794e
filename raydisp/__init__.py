"""raydisp: does dispersion loss help this language model? One YAML in, an honest answer out."""

__version__ = "0.1.0"
