"""All or nothing: the staging folder beside an output, and the manifest whose presence means that it is whole."""
