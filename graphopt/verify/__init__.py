"""Translation validation: each rewrite is cut out of its graph as a before/after pair and run on many inputs."""
