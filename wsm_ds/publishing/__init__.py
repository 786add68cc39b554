"""An output appears whole or not at all: the staging folder next to it, and the manifest that marks it as complete."""
