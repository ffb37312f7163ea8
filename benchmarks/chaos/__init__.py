"""A storm: callers, invalidations and workers while processes are killed, servers freeze and links are cut."""
