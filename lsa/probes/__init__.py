"""The probes, one file each; a file's name is its probe's name."""
