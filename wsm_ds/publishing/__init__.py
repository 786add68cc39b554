"""All or nothing: the staging folder next to an output, and the manifest, whose presence means that it is whole."""
