"""Do the work of a plan: schedule tasks over ranks and workers, run passes, compute and write segments."""
