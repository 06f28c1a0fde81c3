"""Where a study's steps run: processes on this machine, or Ray tasks."""
